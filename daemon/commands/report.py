"""`selfpruner report`: one HTML file with the charts and figures of searches, or the charts alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from daemon.commands import flags
from daemon.commands.output import print_result
from daemon.monitor.record import SearchRecord
from daemon.monitor.remote import chosen_search, folder_of
from daemon.monitor.report import charts_of, save_report
from protocol.errors import SettingsError


def report(
    search: Annotated[
        list[str] | None, typer.Option("--search", help="Name of a search; repeatable, to show several side by side.")
    ] = None,
    folder: flags.Folder = Path("runs"),
    out: Annotated[Path | None, typer.Option(help="HTML file to write.", callback=flags.expanded_if_given)] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Folder for the charts as SVG files.", callback=flags.expanded_if_given)
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Folder for the charts as PNG files.", callback=flags.expanded_if_given)
    ] = None,
    json_: flags.Json = False,
) -> None:
    """Write a report of searches, running or finished: one HTML file that needs no network, or charts alone."""
    if not (out or svg or png):
        raise SettingsError("name what to write: --out FILE.html, --svg FOLDER or --png FOLDER")
    names = list(dict.fromkeys(search or [chosen_search(None, None, folder)]))
    records = [SearchRecord.read(folder_of(folder, name)) for name in names]
    written: list[Path] = []
    if out:
        save_report(records, out)
        written.append(out)
    try:
        for place, suffix in ((svg, ".svg"), (png, ".png")):
            if place:
                place.mkdir(parents=True, exist_ok=True)
                charts = charts_of(records).items()
                written += [drawing.save(place / f"{name}{suffix}") for name, drawing in charts]
    except OSError as error:
        raise SettingsError(f"{error.filename} cannot be written: {error.strerror}") from error
    print_result({"files": [str(path) for path in written]}, json_, lambda: _lines(written))


def _lines(written: list[Path]) -> Iterator[str]:
    return (str(path) for path in written)
