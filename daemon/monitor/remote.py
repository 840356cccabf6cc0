"""Looking at a search from another process, and steering it: status, best, pause, resume, stop."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from agents.population.population import Evaluation
from daemon.local.valkey import embedded_url
from daemon.monitor.events import Event, Follower
from daemon.monitor.status import AroundReader, Condition, QueueDepth, Seen, Status
from daemon.state.history import RemoteHistory
from daemon.state.journal import BEST, STATUS_FILE, best_record, saved
from protocol.errors import StoreError, UsageError
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import connect, is_transient, permanent_error
from protocol.queue.control import Command, Control
from protocol.queue.keys import Keys, check_search_name, parse_stored, parse_unless_damaged
from protocol.queue.profile_board import ProfileBoard


@dataclass(frozen=True)
class BestSoFar:
    """The best of a search as best.json has it, and the search's status, where one is known."""

    record: dict[str, Any]
    status: Status | None

    @property
    def origin(self) -> str:
        """Where the rates come from, in words for a model card."""
        name, status = f"search {self.record.get('search')}", self.status
        if status is None or status.finished:
            return name
        known = status.measured + status.failed + status.stopped
        return f"{name}, which was not finished: after {known:,} candidate{'s' if known != 1 else ''}"


class RemoteSearch:
    """A search in a Redis server that answers."""

    def __init__(self, redis: Redis, keys: Keys, spec: SearchSpec) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._spec = spec
        self._history = RemoteHistory(redis, keys)
        self._profiles = ProfileBoard(redis, keys)
        self._around = AroundReader(redis, keys)
        self._follower = Follower()

    async def status(self) -> Status:
        """How far it is."""
        await self.changes()
        return self.seen

    @property
    def seen(self) -> Status:
        """The status at the last look."""
        assert self._follower.status is not None, "changes() or status() comes first"
        return self._follower.status

    async def changes(self) -> list[Event]:
        """What happened since the last look; nothing at the first one."""
        if not await self._history.read():
            self._follower = Follower()
        profile = await self._profiles.read(self._spec.fingerprint)
        condition = await self._redis.get(self._keys.condition)
        seen = Seen(
            search=self._keys.search,
            spec=self._spec,
            ledger=self._history.ledger,
            population=self._history.population,
            counters=self._history.counters,
            dense_perplexity=profile.dense.perplexity if profile else None,
            around=await self._around.read(),
            condition=(condition and parse_unless_damaged(Condition, condition, self._keys.condition)) or Condition(),
        )
        return self._follower.look(seen)

    def redis_is_away(self) -> list[Event]:
        """To be called where `changes` raised that."""
        return self._follower.redis_is_away()

    async def best_so_far(self) -> BestSoFar:
        """The best candidate so far, and how far the search was when it was."""
        record = await self.best()
        try:
            return BestSoFar(record, await self.status())
        except (StoreError, RedisError, OSError):  # what cannot be read of the status takes nothing from the rates
            return BestSoFar(record, None)

    async def best(self) -> dict[str, Any]:
        """The best candidate so far, as best.json has it."""
        await self._history.read()
        best, profile = self._history.population.best(), await self._profiles.read(self._spec.fingerprint)
        if best is None or profile is None:
            raise UsageError(f"the search {self._keys.search!r} has measured no candidate yet")
        return best_record(self._keys.search, self._spec, profile.shape, best)

    def top(self, count: int) -> list[Evaluation]:
        """The best members at the last look, best first."""
        return self._history.population.top(count)

    async def command(self, command: Command) -> dict[str, Any]:
        """Command run, pause or stop."""
        await Control(self._redis, self._keys).write(command)
        return {"search": self._keys.search, "control": command}


@asynccontextmanager
async def open_remote(search: str, redis_url: str | None, folder: Path) -> AsyncIterator[RemoteSearch]:
    """The search called `search` under `redis_url`, or in its embedded server; UsageError if there is none.

    What the server refuses, there or in the block, is SettingsError; what cannot be read of it, StoreError.
    """
    keys = Keys(check_search_name(search))
    if redis_url is None:
        _check_folder(folder, search)
    redis = connect(redis_url or embedded_url(folder / search))
    client: Any = redis
    found = None
    try:
        text = await client.get(keys.spec)
        if text is None:
            raise UsageError(f"there is no search {search!r} in this Redis")
        found = RemoteSearch(redis, keys, parse_stored(SearchSpec, text, keys.spec))
        yield found
    except BrokenPipeError:  # of whoever reads our answers
        raise
    except (RedisError, OSError) as error:
        if refusal := permanent_error(error):
            raise refusal from None
        if not is_transient(error):
            raise StoreError(f"the server of the search {search!r} answers with an error: {error}") from error
        if found is not None:
            raise NotRunning(f"the server of the search {search!r} went away: {error}") from error
        if redis_url is None:
            raise NotRunning(_not_running(folder, search)) from error
        raise NotRunning(f"no server answers for the search {search!r} ({error})") from error
    finally:
        await redis.aclose()


class NotRunning(UsageError):  # noqa: N818
    """The search's server does not answer."""


def _check_folder(folder: Path, search: str) -> None:
    """Raise UsageError where `folder` has no folder of the search; it names those that it has."""
    if (folder / search).is_dir():
        return
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if found:
        raise UsageError(f"there is no search {search!r} in {folder}/; choose with --search: {', '.join(found)}")
    raise UsageError(f"there is no search {search!r} in {folder}/, and no other (--folder or --redis-url says where)")


def _not_running(folder: Path, search: str) -> str:
    return (
        f"the search {search!r} in {folder}/ is not running now: `selfpruner run` with its settings goes on; "
        "if its server is elsewhere, give --redis-url"
    )


def saved_status(folder: Path) -> Status | None:
    """How far the search in `folder` came, without the processes that it then had; None if it never began."""
    record = saved(folder, STATUS_FILE)
    if record is None:
        return None
    try:
        status = Status.model_validate(record)
    except ValidationError as error:
        raise UsageError(f"{folder / STATUS_FILE} was written by another version, or is damaged") from error
    left = status.queue.queued + status.queue.running
    return status.model_copy(update={"daemon": None, "workers": (), "queue": QueueDepth(queued=left)})


async def best_so_far(search: str, redis_url: str | None, folder: Path) -> BestSoFar:
    """Of the search that runs; of one that ran here and has ended, what it left in its folder."""
    try:
        async with open_remote(search, redis_url, folder) as remote:
            return await remote.best_so_far()
    except NotRunning:
        record = saved(folder / search, BEST) if redis_url is None else None
        if record is None:
            raise
    try:
        return BestSoFar(record, saved_status(folder / search))
    except UsageError:  # a damaged status takes nothing from the rates
        return BestSoFar(record, None)


async def ask(
    search: str,
    redis_url: str | None,
    folder: Path,
    question: Callable[[RemoteSearch], Awaitable[dict[str, Any]]],
    *,
    otherwise: str,
) -> dict[str, Any]:
    """The running search's answer; of one that ran here and has ended, what it left in the file `otherwise`."""
    try:
        async with open_remote(search, redis_url, folder) as remote:
            return await question(remote)
    except NotRunning:
        record = saved(folder / search, otherwise) if redis_url is None else None
        if record is None:
            raise
        return record
