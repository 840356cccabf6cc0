"""`selfpruner list | status | watch | best | pause | resume | stop`: show and control searches of other processes."""

import asyncio
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from daemon.commands import flags, tables
from daemon.commands.output import print_result, stdout_console
from daemon.monitor.events import Event
from daemon.monitor.remote import (
    NotRunning,
    RemoteSearch,
    ask,
    best_so_far,
    chosen_search,
    open_remote,
    saved_status,
    statuses,
)
from daemon.monitor.watch import follow, json_lines, on_screen
from daemon.monitor.watch_screen import Screen, list_table, status_tables
from protocol.queue.control import Command


def status(
    search: flags.WhichSearch = None,
    redis_url: flags.RedisUrl = None,
    folder: flags.Folder = Path("runs"),
    json_: flags.Json = False,
) -> None:
    """Show the progress of a search."""
    found = asyncio.run(
        ask(chosen_search(search, redis_url, folder), redis_url, folder, RemoteSearch.status, saved_status)
    )
    print_result(found.model_dump(mode="json"), json_, lambda: status_tables(found))


def list_(
    redis_url: flags.RedisUrl = None,
    folder: flags.Folder = Path("runs"),
    json_: flags.Json = False,
) -> None:
    """List all searches in --folder, or on the server --redis-url."""
    found = asyncio.run(statuses(redis_url, folder))
    records = {name: status.model_dump(mode="json") if status else None for name, status in found.items()}
    print_result(records, json_, lambda: list_table(found))


def watch(
    search: flags.WhichSearch = None,
    redis_url: flags.RedisUrl = None,
    folder: flags.Folder = Path("runs"),
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per change, as when stdout is not a terminal.")
    ] = False,
) -> None:
    """Follow a search live until it ends. Ctrl-C stops watching, not the search."""
    try:
        asyncio.run(_watch(chosen_search(search, redis_url, folder), redis_url, folder, json_=json_))
    except BrokenPipeError:  # the reader has closed the pipe; discard what is still buffered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def best(
    search: flags.WhichSearch = None,
    redis_url: flags.RedisUrl = None,
    folder: flags.Folder = Path("runs"),
    json_: flags.Json = False,
) -> None:
    """Show the best pruning rates so far."""
    record = asyncio.run(best_so_far(chosen_search(search, redis_url, folder), redis_url, folder)).record
    print_result(record, json_, lambda: tables.best(record))


def pause(
    search: flags.WhichSearch = None, redis_url: flags.RedisUrl = None, folder: flags.Folder = Path("runs")
) -> None:
    """Pause a search. Evaluations in progress complete; a restart does not end the pause."""
    _command("pause", search, redis_url, folder)


def resume(
    search: flags.WhichSearch = None, redis_url: flags.RedisUrl = None, folder: flags.Folder = Path("runs")
) -> None:
    """Resume a paused search."""
    _command("run", search, redis_url, folder)


def stop(
    search: flags.WhichSearch = None, redis_url: flags.RedisUrl = None, folder: flags.Folder = Path("runs")
) -> None:
    """Stop a search's daemon. Outcomes are kept, and the search can be started again."""
    _command("stop", search, redis_url, folder)


async def _watch(search: str, redis_url: str | None, folder: Path, *, json_: bool) -> None:
    own = None if redis_url else folder / search
    with ExitStack() as stack:
        if json_ or not sys.stdout.isatty():
            show = json_lines(sys.stdout)
        else:
            live = stack.enter_context(Live(console=stdout_console(), auto_refresh=False))
            show = on_screen(live, Screen())
        try:
            async with open_remote(search, redis_url, folder) as remote:
                await follow(remote, own, show)
        except NotRunning:
            status = saved_status(own) if own else None
            if status is None:
                raise
            show(status, (), [Event("search_ended", {"finished": status.finished})])


def _command(command: Command, given: str | None, redis_url: str | None, folder: Path) -> None:
    search = chosen_search(given, redis_url, folder)

    async def write() -> None:
        async with open_remote(search, redis_url, folder) as remote:
            await remote.command(command)

    asyncio.run(write())
    Console().print(f"{search}: {_DONE[command]}", highlight=False)


_DONE: dict[Command, str] = {
    "pause": "pausing; evaluations in progress will complete, and so will preparation",
    "run": "resumed",
    "stop": "stopping; outcomes are kept, and `selfpruner run` resumes the search",
}
