"""The paper's Tables 1 to 7 over models, rates and methods of your own, cell by cell.

    python -m benchmarks.paper.__main__ benchmarks/paper/smollm2.yaml --out runs/paper
    python -m benchmarks.paper.__main__ benchmarks/paper/llama-2-7b.yaml --estimate

Each cell is a run of `selfpruner` in a process of its own; OUT/cells has one file for each. Interrupted or killed, the
same command goes on. A cell that fails is told in the table with its sentence, and is tried again at the next call.
OUT/tables.md and OUT/tables.json are written after every cell, the plots at the end; --render writes them and runs
nothing, also while another call runs cells.
Exit code 1: some cells have failed. 2: the settings are wrong, or OUT cannot be written.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.holding import make_folder, the_only_one, writing
from benchmarks.paper.cells import CellStore, Failed, Outcome, with_needs
from benchmarks.paper.checking import check
from benchmarks.paper.costs import TFLOPS, CostModel
from benchmarks.paper.rendering import as_json, expected, markdown
from benchmarks.paper.running import Runner, SubprocessRunner, load_outcomes, missing, run_missing
from benchmarks.paper.settings import read_settings
from benchmarks.paper.tables import WantedTable
from benchmarks.paper.wanted import wanted_tables
from protocol.errors import SelfPrunerError, SettingsError, UsageError
from protocol.runtime.files import replace
from protocol.runtime.signals import Interrupted, interruptible


def main(arguments: Sequence[str] | None = None, runner: Runner | None = None) -> int:
    """Run what is missing and write the tables; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        with interruptible():
            return _make(given, runner or SubprocessRunner())
    except SelfPrunerError as error:
        _tell(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except Interrupted as end:
        _tell("interrupted; the same command goes on")
        return end.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="a YAML file such as benchmarks/paper/smollm2.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--set", action="append", default=[], help="one setting, such as texts.seqlen=512; repeatable")
    parser.add_argument("--estimate", action="store_true", help="say what is missing and how long it takes, and end")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="peak in bf16, where no cell has been measured")
    parser.add_argument("--render", action="store_true", help="write the tables of what is there, and run nothing")
    return parser


def _make(given: argparse.Namespace, runner: Runner) -> int:
    if not 0 < given.tflops < math.inf:
        raise SettingsError(f"--tflops cannot be {given.tflops:g}: no GPU has it")
    settings = read_settings(given.settings, given.set)
    tables = wanted_tables(settings)
    cells = [cell for table in tables for cell in table.cells]
    every_cell = with_needs(cells)
    store = CellStore(given.out)
    if given.estimate:
        outcomes = load_outcomes(cells, store)
        cost = CostModel(settings.models, every_cell, outcomes, given.tflops)
        _show_expected(*expected(tables, outcomes, given.out, cost))
        return 0
    if given.render:
        make_folder(given.out)
        write_all(tables, load_outcomes(cells, store), given.out, settings.words)
        return 0
    with the_only_one(given.out, f"the tables in {given.out} are being made by another process"):
        outcomes = load_outcomes(cells, store)
        check(missing(cells, outcomes, given.out), given.out)
        cost = CostModel(settings.models, every_cell, outcomes, given.tflops)
        try:
            write(tables, outcomes, given.out, settings.words)
            for _ in run_missing(cells, outcomes, store, runner, given.out, cost, _tell):
                write(tables, outcomes, given.out, settings.words)
        except Interrupted:
            write_all(tables, outcomes, given.out, settings.words)
            raise
        write_all(tables, outcomes, given.out, settings.words)
    failed = sum(isinstance(outcomes.get(cell.id), Failed) for cell in every_cell)
    if failed:
        _tell(f"{failed} cells have failed; the same command tries them again")
    return int(failed > 0)


def write(tables: Sequence[WantedTable], outcomes: Mapping[str, Outcome], out: Path, about: str) -> None:
    """Write OUT/tables.md and OUT/tables.json. Raises UsageError where there is no room for them."""
    with writing(out):
        replace(out / "tables.md", markdown(tables, outcomes, about))
        replace(out / "tables.json", json.dumps(as_json(tables, outcomes, about), indent=1, ensure_ascii=False) + "\n")


def write_all(tables: Sequence[WantedTable], outcomes: Mapping[str, Outcome], out: Path, about: str) -> None:
    """The same, and where matplotlib is there the plots, which take seconds."""
    write(tables, outcomes, out, about)
    _tell(f"written: {out / 'tables.md'}")
    try:
        from benchmarks.paper.plots import plot
    except ImportError:
        _tell("no plots: pip install 'self-pruner[plots]'")
        return
    with writing(out):
        plot(tables, outcomes, out)


def _show_expected(rows: Sequence[Sequence[str]], total: str) -> None:
    shown = Table("cell", "what", "hours", "from")
    for row in rows:
        shown.add_row(*row)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(shown)
    console.print(total)


def _tell(sentence: str) -> None:
    print(f"paper_tables: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
