"""The command line of a cell, how `selfpruner` parses it, and the paths of its files."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import typer

from benchmarks.paper.cells import Cell
from benchmarks.paper.settings import ROOT
from daemon.cli import app
from daemon.commands.flags import FLAG_ERROR, flag_sentence
from protocol.errors import SettingsError
from protocol.results.formats import FACTS


def searches_folder(out: Path) -> Path:
    """Return the folder with one subfolder for each search."""
    return out / "searches"


def model_folder(out: Path, cell: Cell) -> Path:
    """Return the folder of a cell that writes a model."""
    return out / "models" / cell.id


def made_file(out: Path, cell: Cell) -> Path:
    """Return a file that exists while the cell's output does: a search's best.json, an export's selfpruner.json."""
    if cell.what == "run":
        return best_file(out, cell)
    return model_folder(out, cell) / FACTS


def best_file(out: Path, search: Cell) -> Path:
    """Return the file with the best rates of a search."""
    return searches_folder(out) / search.id / "best.json"


def command(cell: Cell, out: Path) -> list[str]:
    """Return the arguments of `selfpruner` for a cell whose dependencies have been run."""
    return [cell.what, *_where(cell, out), *cell.flags, "--json"]


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse `arguments`, a command and its flags, like `selfpruner`, without running it. Returns parameters by name.

    Raises SettingsError for flags that `selfpruner` would reject.
    """
    name, *flags = arguments
    try:
        # Without --help, which would print the help and exit.
        context = _commands()[name].make_context(f"selfpruner {name}", flags, help_option_names=[])
    except FLAG_ERROR as error:
        raise SettingsError(flag_sentence(error)) from error
    return dict(context.params)


@cache
def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def _where(cell: Cell, out: Path) -> list[str]:
    if cell.what == "run":
        assert cell.config is not None
        here = ["--set", f"search.name={cell.id}", "--set", f"run.folder={searches_folder(out)}"]
        return [str(ROOT / cell.config), *here]
    need = cell.needs[0] if cell.needs else None
    if need is None:
        return [cell.model] if cell.what == "zero-shot" else []
    # Use --force, because a kill may have come after the folder was complete, but before the outcome was stored.
    written = ["--out", str(model_folder(out, cell)), "--force"]
    if cell.what == "export":
        return ["--search", need.id, "--folder", str(searches_folder(out)), "--format", "hf", *written]
    if need.what == "run":
        return [cell.model, "--rates", str(best_file(out, need))]
    return [str(model_folder(out, need)), *(written if cell.what == "finetune" else [])]
