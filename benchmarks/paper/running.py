"""Runs cells, one after the other, each as a process of its own, and keeps what they say."""

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

from benchmarks.holding import writing
from benchmarks.paper.answers import UnreadableAnswer, read
from benchmarks.paper.cells import Cell, CellStore, Failed, Measured, Outcome, figures_of, with_needs
from benchmarks.paper.commands import command, made_file
from benchmarks.paper.costs import CostModel
from protocol.runtime.signals import held_back

TOLD_BY = "selfpruner: "
"""How the command line begins its one sentence."""


@dataclass(frozen=True)
class Failure:
    """Why a command has no answer, in one sentence."""

    sentence: str


class Runner(Protocol):
    """Whatever runs `selfpruner`."""

    def run(self, arguments: Sequence[str], log: Path) -> dict[str, Any] | Failure:
        """Run `selfpruner` with `arguments`, stderr appended to `log`; what it printed as JSON, or why it failed."""


class SubprocessRunner:
    """Runs each command as a process: a crash, or memory that runs out, takes nothing else along.

    When this process is interrupted, or dies, the command gets SIGTERM; interrupted, its end is waited for.
    """

    def run(self, arguments: Sequence[str], log: Path) -> dict[str, Any] | Failure:
        """See Runner."""
        prefix = [sys.executable, "-m", "daemon.local.end_with_parent", str(os.getpid())]
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        with log.open("ab") as errors:
            start = errors.tell()
            # A group of its own: Ctrl-C is for this process, which then says it once to the command.
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
        if line.startswith(TOLD_BY):
            return line.removeprefix(TOLD_BY)
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (": memory may have run out" if name == "SIGKILL" else "")
    return f"ended with code {code}: {lines[-1][:300]}" if lines else f"ended with code {code}"


def missing(cells: Iterable[Cell], outcomes: Mapping[str, Outcome], out: Path) -> list[Cell]:
    """The cells, and those that they need, that are to be run, in an order in which they can.

    Not measured yet; or measured, but needed by such a one, and what they made in `out` is there no more.
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
    # What was kept and cannot be read is measured again.
    return isinstance(outcome, Measured) and not isinstance(figures_of(cell, outcome), str)


def load_outcomes(cells: Iterable[Cell], store: CellStore) -> dict[str, Outcome]:
    """What is known of the cells and of those that they need, by id."""
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
    """Run what is missing and put it into `outcomes` and `store`; a cell that fails does not stop the others.

    Yields each cell when it has ended. Raises UsageError where `out` cannot be written.
    """
    todo = missing(cells, outcomes, out)
    newest = dict(outcomes)
    for number, cell in enumerate(todo):
        tell(f"{number + 1} of {len(todo)}: {cell.words}; {_expected(todo[number:], cost)}")
        outcome = newest[cell.id] = _run(cell, newest, runner, out)
        # A cell that was to make its files again stays measured, even if that fails.
        if isinstance(outcome, Measured) or not _is_measured(cell, outcomes):
            with held_back():
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
            return Failed(sentence=f"{need.words} failed before it: {why}")
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
        return "nothing says how long it takes"
    known = [seconds for seconds in each if seconds is not None]
    rest = "" if len(known) == len(each) else ", without those of which nothing says it"
    return f"about {in_words(each[0])}, with all that is left {in_words(sum(known))}{rest}"


def in_words(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
