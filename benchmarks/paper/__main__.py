"""Reproduces the paper's Tables 1 to 7 for chosen models, rates and methods, cell by cell.

    python -m benchmarks.paper benchmarks/paper/smollm2.yaml --out runs/paper
    python -m benchmarks.paper benchmarks/paper/llama-2-7b.yaml --estimate

Each cell is one run of `selfpruner` in its own process, with one result file in OUT/cells. After an interruption, the
same command resumes. A failed cell appears in its table with the error message, and is retried at the next call.
OUT/tables.md and OUT/tables.json are written after every cell, the plots at the end. --render writes them without
running any cell, also while another process runs cells.
Exit code 1: some cells failed. 2: the settings are invalid, or OUT cannot be written.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.output_folder import lock_folder, make_folder, reporting_write_errors
from benchmarks.paper.cells import CellStore, Failed, Outcome, with_needs
from benchmarks.paper.costs import TFLOPS, CostModel
from benchmarks.paper.preflight import check_cells
from benchmarks.paper.runner import Runner, SubprocessRunner, load_outcomes, missing, run_missing
from benchmarks.paper.settings import read_settings
from benchmarks.paper.table_formats import estimate_rows, tables_json, tables_markdown
from benchmarks.paper.table_layouts import table_layouts
from benchmarks.paper.tables import TableLayout
from protocol.errors import SelfPrunerError, SettingsError, UsageError
from protocol.runtime.files import write_atomically
from protocol.runtime.signals import Interrupted, interruptible


def main(arguments: Sequence[str] | None = None, runner: Runner | None = None) -> int:
    """Run the missing cells and write the tables. Returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        with interruptible():
            return _make(given, runner or SubprocessRunner())
    except SelfPrunerError as error:
        _print_status(str(error))
        return 2 if isinstance(error, UsageError) else 1
    except Interrupted as end:
        _print_status("interrupted; run the same command to resume")
        return end.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", type=Path, help="a YAML file such as benchmarks/paper/smollm2.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="output folder (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], help="change a setting: texts.seqlen=512 (repeatable)")
    parser.add_argument("--estimate", action="store_true", help="list the missing cells with estimated hours, and exit")
    parser.add_argument(
        "--tflops",
        type=float,
        default=TFLOPS,
        help="peak bf16 TFLOPS of your GPU, for estimates before the first measured cell (default: %(default)g)",
    )
    parser.add_argument("--render", action="store_true", help="write tables and plots of the finished cells, and exit")
    return parser


def _make(given: argparse.Namespace, runner: Runner) -> int:
    if not 0 < given.tflops < math.inf:
        raise SettingsError(f"--tflops cannot be {given.tflops:g}: it must be a positive number")
    settings = read_settings(given.settings, given.set)
    tables = table_layouts(settings)
    cells = [cell for table in tables for cell in table.cells]
    every_cell = with_needs(cells)
    store = CellStore(given.out)
    if given.estimate:
        outcomes = load_outcomes(cells, store)
        cost = CostModel(settings.models, every_cell, outcomes, given.tflops)
        _print_estimate(*estimate_rows(tables, outcomes, given.out, cost))
        return 0
    if given.render:
        make_folder(given.out)
        write_with_plots(tables, load_outcomes(cells, store), given.out, settings.description)
        return 0
    with lock_folder(given.out, f"another process is making the tables in {given.out}"):
        outcomes = load_outcomes(cells, store)
        check_cells(missing(cells, outcomes, given.out), given.out)
        cost = CostModel(settings.models, every_cell, outcomes, given.tflops)
        try:
            write_tables(tables, outcomes, given.out, settings.description)
            for _ in run_missing(cells, outcomes, store, runner, given.out, cost, _print_status):
                write_tables(tables, outcomes, given.out, settings.description)
        except Interrupted:
            write_with_plots(tables, outcomes, given.out, settings.description)
            raise
        write_with_plots(tables, outcomes, given.out, settings.description)
    failed = sum(isinstance(outcomes.get(cell.id), Failed) for cell in every_cell)
    if failed:
        _print_status(f"{failed} cells failed; run the same command to retry them")
    return int(failed > 0)


def write_tables(tables: Sequence[TableLayout], outcomes: Mapping[str, Outcome], out: Path, about: str) -> None:
    """Write OUT/tables.md and OUT/tables.json. Raises UsageError if that fails."""
    with reporting_write_errors(out):
        write_atomically(out / "tables.md", tables_markdown(tables, outcomes, about))
        write_atomically(
            out / "tables.json", json.dumps(tables_json(tables, outcomes, about), indent=1, ensure_ascii=False) + "\n"
        )


def write_with_plots(tables: Sequence[TableLayout], outcomes: Mapping[str, Outcome], out: Path, about: str) -> None:
    """Write the tables, and the plots (which take seconds) if matplotlib is installed."""
    write_tables(tables, outcomes, out, about)
    _print_status(f"written: {out / 'tables.md'}")
    try:
        from benchmarks.paper.plots import plot
    except ImportError:
        _print_status("no plots: pip install '.[plots]'")
        return
    with reporting_write_errors(out):
        plot(tables, outcomes, out)


def _print_estimate(rows: Sequence[Sequence[str]], total: str) -> None:
    shown = Table("cell", "description", "hours", "estimated from")
    for row in rows:
        shown.add_row(*row)
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(shown)
    console.print(total)


def _print_status(sentence: str) -> None:
    print(f"benchmarks.paper: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
