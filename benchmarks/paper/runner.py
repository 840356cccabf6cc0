"""Runs cells one after the other, each in its own process, and stores their outcomes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.output_folder import reporting_write_errors
from benchmarks.paper.answers import UnreadableAnswer, read
from benchmarks.paper.cells import Cell, CellStore, Failed, Measured, Outcome, figures_of, with_needs
from benchmarks.paper.commands import command, made_file
from benchmarks.paper.costs import CostModel
from protocol.runtime.signals import defer_signals

ERROR_PREFIX = "selfpruner: "
"""The beginning of an error message of the command line."""


@dataclass(frozen=True)
class Failure:
    """The reason why a command has no answer, in one sentence."""

    sentence: str


class Runner(Protocol):
    """Runs `selfpruner` commands."""

    def run(self, arguments: Sequence[str], log: Path) -> dict[str, Any] | Failure:
        """Run `selfpruner` with `arguments` and append stderr to `log`. Returns its JSON, or why it failed."""


class SubprocessRunner:
    """Runs each command in its own process, so that a crash or a lack of memory affects nothing else.

    If this process is interrupted or dies, the command gets SIGTERM. After an interruption, this process waits until
    the command has ended.
    """

    def run(self, arguments: Sequence[str], log: Path) -> dict[str, Any] | Failure:
        """See Runner."""
        prefix = [sys.executable, "-m", "daemon.local.end_with_parent", str(os.getpid())]
        with reporting_write_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        with log.open("ab") as errors:
            start = errors.tell()
            # In its own process group, so that Ctrl-C reaches only this process, which then sends SIGTERM once.
            child = subprocess.Popen(
                [*prefix, sys.executable, "-m", "daemon", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                process_group=0,
            )
            try:
                said, _ = child.communicate()
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
        if child.returncode:
            return Failure(_why(child.returncode, log, start))
        try:
            answer = json.loads(said)
        except ValueError:
            answer = None
        return answer if isinstance(answer, dict) else Failure("it printed no JSON object")


def _why(code: int, log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith(ERROR_PREFIX):
            return line.removeprefix(ERROR_PREFIX)
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (": memory may have run out" if name == "SIGKILL" else "")
    return f"ended with code {code}: {lines[-1][:300]}" if lines else f"ended with code {code}"


def missing(cells: Iterable[Cell], outcomes: Mapping[str, Outcome], out: Path) -> list[Cell]:
    """Return the cells to run, including the cells that they need, in an order in which they can run.

    A cell is missing if it is not measured, or if a missing cell needs its files in `out` and they no longer exist.
    """
    found: list[Cell] = []
    needed: set[str] = set()
    for cell in reversed(with_needs(cells)):
        is_gone = cell.id in needed and not made_file(out, cell).is_file()
        if is_gone or not _is_measured(cell, outcomes):
            found.append(cell)
            needed |= {need.id for need in cell.needs}
    return found[::-1]


def _is_measured(cell: Cell, outcomes: Mapping[str, Outcome]) -> bool:
    outcome = outcomes.get(cell.id)
    # A cell is run again if its stored answer cannot be read.
    return isinstance(outcome, Measured) and not isinstance(figures_of(cell, outcome), str)


def load_outcomes(cells: Iterable[Cell], store: CellStore) -> dict[str, Outcome]:
    """Return the stored outcomes of the cells and of those that they need, by id."""
    found = {cell.id: store.load(cell) for cell in with_needs(cells)}
    return {id_: outcome for id_, outcome in found.items() if outcome is not None}


def run_missing(
    cells: Sequence[Cell],
    outcomes: dict[str, Outcome],
    store: CellStore,
    runner: Runner,
    out: Path,
    cost: CostModel,
    tell: Callable[[str], None],
) -> Iterator[Cell]:
    """Run the missing cells and add their outcomes to `outcomes` and `store`. A failed cell does not stop the others.

    Yields each cell when it is finished. Raises UsageError if `out` cannot be written.
    """
    todo = missing(cells, outcomes, out)
    newest = dict(outcomes)
    for number, cell in enumerate(todo):
        tell(f"{number + 1} of {len(todo)}: {cell.description}; {_expected(todo[number:], cost)}")
        outcome = newest[cell.id] = _run(cell, newest, runner, out)
        # A cell that ran only to write its files again keeps its measured outcome, even if this run failed.
        if isinstance(outcome, Measured) or not _is_measured(cell, outcomes):
            with defer_signals():
                outcomes[cell.id] = outcome
                store.keep(cell, outcome)
        if isinstance(outcome, Measured):
            cost.learn(cell, outcome)
        else:
            tell(f"failed: {outcome.sentence}")
        yield cell


def _run(cell: Cell, outcomes: Mapping[str, Outcome], runner: Runner, out: Path) -> Outcome:
    for need in cell.needs:
        outcome = outcomes.get(need.id)
        if not isinstance(outcome, Measured):
            why = outcome.sentence if isinstance(outcome, Failed) else "it was not run"
            return Failed(sentence=f"{need.description} failed before it: {why}")
    begun = time.perf_counter()
    answer = runner.run(command(cell, out), out / "logs" / f"{cell.id}.log")
    seconds = time.perf_counter() - begun
    if isinstance(answer, Failure):
        return Failed(sentence=answer.sentence)
    try:
        read(cell.what, answer)
    except UnreadableAnswer as error:
        return Failed(sentence=str(error))
    if cell.what == "run":
        seconds = max(seconds, float(answer.get("seconds") or 0))
    return Measured(answer=answer, seconds=round(seconds, 1))


def _expected(cells: Sequence[Cell], cost: CostModel) -> str:
    each = [cost.seconds(cell) for cell in cells]
    if each[0] is None:
        return "duration unknown"
    known = [seconds for seconds in each if seconds is not None]
    rest = "" if len(known) == len(each) else ", without cells of unknown duration"
    return f"about {duration_text(each[0])}, all remaining cells {duration_text(sum(known))}{rest}"


def duration_text(seconds: float) -> str:
    """Return a duration as text."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
