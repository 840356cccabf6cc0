"""`selfpruner open`: show the page of a search in the browser, or the report of a search that is not running."""

import asyncio
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from daemon.commands import flags
from daemon.commands.output import stdout_console
from daemon.http_api.token import PAGE_FILE, kept_address
from daemon.monitor.remote import RemoteSearch, ask, chosen_search, saved_status
from daemon.monitor.report import REPORT
from protocol.errors import UsageError
from protocol.queue.keys import check_search_name


def open_(
    search: Annotated[
        str | None, typer.Argument(help="Name of the search; by default the only one in --folder, or `default`.")
    ] = None,
    redis_url: flags.RedisUrl = None,
    folder: flags.Folder = Path("runs"),
    print_: Annotated[
        bool, typer.Option("--print", help="Only print the address, with its token: for SSH, or without a browser.")
    ] = False,
) -> None:
    """Open the page of a running search in the browser; if the search is not running, its report.

    Without a browser, print the address.
    """
    name = check_search_name(chosen_search(search, redis_url, folder))
    status = asyncio.run(ask(name, redis_url, folder, RemoteSearch.status, saved_status))
    place = (folder / name).resolve()
    try:
        if status.daemon is None:
            file, address, said = place / REPORT, None, f"{name} is not running; opened its report {place / REPORT}"
        else:
            file, address, said = place / PAGE_FILE, kept_address(place), f"opened the page of {name}"
        if not file.is_file():
            raise UsageError(_missing(name, file, measured=status.measured))
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error
    # Never the address itself: see `page_file`.
    is_shown = not print_ and webbrowser.open(file.as_uri())
    stdout_console().print(said if is_shown else address or file.as_uri(), soft_wrap=True)


def _missing(name: str, file: Path, *, measured: int) -> str:
    if file.name == REPORT and not measured:
        return f"the search {name!r} is not running, and has measured nothing yet: there is no report of it"
    if file.name == REPORT:
        return (
            f"the search {name!r} is not running, and has no {REPORT} in {file.parent}/: `selfpruner report` makes one"
        )
    return (
        f"the search {name!r} serves no page from {file.parent}/: http.enabled is false, or its daemon runs elsewhere; "
        "the event http_api_listening of its log has the address"
    )
