"""`selfpruner watch`: follows a search in the terminal, or as one JSON object per change. Needs Redis, not HTTP."""

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from redis.exceptions import RedisError, ResponseError
from rich.live import Live

from agents.population.population import Evaluation
from daemon.local.held_folder import is_running
from daemon.monitor.events import Event
from daemon.monitor.remote import RemoteSearch, saved_status
from daemon.monitor.status import Status
from daemon.monitor.watch_screen import SHOWN_MEMBERS, Screen
from protocol.queue.connection import is_transient

LOOK_SECONDS = 1.0

Tell = Callable[[Status, Sequence[Evaluation], Sequence[Event]], None]
"""Shows the status, the best members of the population and what is new, after each look."""


async def watch(remote: RemoteSearch, folder: Path | None, tell: Tell) -> None:
    """Look at a search once a second until it is finished, or has ended.

    `folder` is that of a search whose own server ends with it; None where the server stays, and is waited for.
    """
    tell(await remote.status(), remote.top(SHOWN_MEMBERS), ())
    while not (remote.seen.finished and remote.seen.daemon is None):
        await asyncio.sleep(LOOK_SECONDS)
        try:
            events = await remote.changes()
        except (RedisError, OSError, TimeoutError) as error:
            if isinstance(error, ResponseError) and not is_transient(error):
                raise  # no waiting mends that
            events = remote.redis_is_away()
            if folder is not None and not is_running(folder):
                break
        tell(remote.seen, remote.top(SHOWN_MEMBERS), events)
    last = saved_status(folder) if folder else None
    status = last or remote.seen
    tell(status, remote.top(SHOWN_MEMBERS), [Event("search_ended", {"finished": status.finished})])


def json_lines(to: TextIO) -> Tell:
    """Writes the first status and then each event, one JSON object a line."""
    begun = False

    def tell(status: Status, _members: Sequence[Evaluation], events: Sequence[Event]) -> None:
        nonlocal begun
        records = [event.record() for event in events]
        if not begun:
            records.insert(0, {"event": "status", **status.model_dump(mode="json")})
        begun = True
        for record in records:
            to.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
        to.flush()

    return tell


def on_screen(live: Live, screen: Screen) -> Tell:
    """Keeps `live` up to date with `screen`."""

    def tell(status: Status, members: Sequence[Evaluation], events: Sequence[Event]) -> None:
        screen.take(status, events)
        live.update(screen.render(status, members, live.console.height), refresh=True)

    return tell
