"""`selfpruner cache`: show and delete what preparation has kept of models and texts."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from daemon.commands import flags
from daemon.commands.output import print_result
from protocol.errors import SettingsError

if TYPE_CHECKING:
    from gpu_worker.cache import Entry


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete the entries that are shown.")] = False,
    kind: Annotated[str | None, typer.Option(help="Only entries of this kind, such as `calibration`.")] = None,
    json_: flags.Json = False,
) -> None:
    """Show what preparation has kept of models and texts, so that nothing is measured twice.

    Everything may be deleted: it is measured or unpacked again when it is needed.
    """
    from gpu_worker.cache import KINDS, cache_dir, delete, entries

    if kind is not None and kind not in KINDS:
        raise SettingsError(f"--kind cannot be {kind!r}: the cache keeps {', '.join(KINDS)}")
    found = [entry for entry in entries() if kind in (None, entry.kind)]
    if clear:
        for entry in found:
            delete(entry)
    result = {
        "folder": str(cache_dir()),
        "cleared": clear,
        "bytes": sum(entry.size for entry in found),
        "entries": [_record(entry) for entry in found],
    }
    print_result(result, json_, lambda: _tables(result, found))


def _record(entry: "Entry") -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "model": entry.about,
        "bytes": entry.size,
        "used": datetime.fromtimestamp(entry.used, UTC).isoformat(timespec="seconds"),
        "path": str(entry.path),
    }


def _tables(result: dict[str, Any], found: Sequence["Entry"]) -> Iterator[RenderableType]:
    done = "deleted" if result["cleared"] else "kept"
    yield f"{result['folder']}: {len(found)} entries {done}, {result['bytes'] / 1e6:,.1f} MB"
    if not found:
        return
    table = Table(box=None)
    for column in ("kind", "of", "MB", "last used"):
        table.add_column(column, justify="right" if column == "MB" else "left")
    for entry in found:
        used = datetime.fromtimestamp(entry.used).astimezone().isoformat(" ", "minutes")
        table.add_row(entry.kind, Text(entry.about), f"{entry.size / 1e6:,.1f}", used.partition("+")[0])
    yield table
