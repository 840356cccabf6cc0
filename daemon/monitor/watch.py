"""`selfpruner watch`: follow a search on a terminal, or as one JSON object per change. Needs Redis, not HTTP."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from redis.exceptions import RedisError, ResponseError
from rich.live import Live

from agents.population.population import Evaluation
from daemon.local.folder_lock import is_running
from daemon.monitor.events import Event
from daemon.monitor.remote import RemoteSearch, saved_status
from daemon.monitor.status import Status
from daemon.monitor.watch_screen import SHOWN_MEMBERS, Screen
from protocol.queue.connection import is_transient

LOOK_SECONDS = 1.0

Show = Callable[[Status, Sequence[Evaluation], Sequence[Event]], None]
"""Shows the status, the best members of the population and the new events."""


async def follow(remote: RemoteSearch, folder: Path | None, show: Show) -> None:
    """Read a search's state once a second, and show it, until the search ends.

    `folder` is given if the search has an embedded server, which ends with the search. Without `folder`, wait while the
    server is unreachable.
    """
    show(await remote.status(), remote.top(SHOWN_MEMBERS), ())
    while not (remote.last_status.finished and remote.last_status.daemon is None):
        await asyncio.sleep(LOOK_SECONDS)
        try:
            events = await remote.changes()
        except (RedisError, OSError, TimeoutError) as error:
            if isinstance(error, ResponseError) and not is_transient(error):
                raise  # waiting does not help
            events = remote.redis_is_away()
            if folder is not None and not is_running(folder):
                break
        show(remote.last_status, remote.top(SHOWN_MEMBERS), events)
    last = saved_status(folder) if folder else None
    status = last or remote.last_status
    show(status, remote.top(SHOWN_MEMBERS), [Event("search_ended", {"finished": status.finished})])


def json_lines(to: TextIO) -> Show:
    """Return a function that writes the first status and then each event, as one JSON object per line."""
    begun = False

    def show(status: Status, _members: Sequence[Evaluation], events: Sequence[Event]) -> None:
        nonlocal begun
        records = [event.record() for event in events]
        if not begun:
            records.insert(0, {"event": "status", **status.model_dump(mode="json")})
        begun = True
        for record in records:
            to.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
        to.flush()

    return show


def on_screen(live: Live, screen: Screen) -> Show:
    """Return a function that adds a status and events to `screen`, and shows it on `live`."""

    def show(status: Status, members: Sequence[Evaluation], events: Sequence[Event]) -> None:
        screen.take(status, events)
        live.update(screen.render(status, members, live.console.height), refresh=True)

    return show
