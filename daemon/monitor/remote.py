"""Access to a search from another process: status, best, pause, resume, stop."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from agents.population.population import Evaluation
from daemon.local.valkey import embedded_url
from daemon.monitor.events import Event, StatusTracker
from daemon.monitor.status import Condition, Observation, QueueDepth, RuntimeStateReader, Status
from daemon.state.history import HistoryReader
from daemon.state.journal import BEST, LOG, STATUS_FILE, best_record, saved
from protocol.errors import SelfPrunerError, StoreError, UsageError
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import connect, is_transient, permanent_error
from protocol.queue.control import Command, Control
from protocol.queue.keys import SEARCH_NAME, Keys, check_search_name, parse_stored, parse_unless_damaged
from protocol.queue.profile_board import ProfileBoard

T = TypeVar("T")


@dataclass(frozen=True)
class BestSoFar:
    """The best candidate in the form of best.json, with the search's status if it is known."""

    record: dict[str, Any]
    status: Status | None

    @property
    def origin(self) -> str:
        """Where the rates come from, for a model card."""
        name, status = f"search {self.record.get('search')}", self.status
        if status is None or status.finished:
            return name
        known = status.measured + status.failed + status.stopped
        return f"{name}, unfinished, after {known:,} candidate{'s' if known != 1 else ''}"


class RemoteSearch:
    """A search in a Redis server that answers."""

    def __init__(self, redis: Redis, keys: Keys, spec: SearchSpec) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._spec = spec
        self._reader = HistoryReader(redis, keys)
        self._profiles = ProfileBoard(redis, keys)
        self._runtime_state = RuntimeStateReader(redis, keys)
        self._tracker = StatusTracker()

    async def status(self) -> Status:
        """Return the current status."""
        await self.changes()
        return self.last_status

    @property
    def last_status(self) -> Status:
        """The status at the last observation."""
        assert self._tracker.status is not None, "changes() or status() comes first"
        return self._tracker.status

    async def changes(self) -> list[Event]:
        """Return the events since the last observation; the first observation has no events."""
        if not await self._reader.read():
            self._tracker = StatusTracker()
        profile = await self._profiles.read(self._spec.fingerprint)
        condition = await self._redis.get(self._keys.condition)
        observation = Observation(
            search=self._keys.search,
            spec=self._spec,
            ledger=self._reader.history.ledger,
            population=self._reader.history.population,
            counters=self._reader.history.counters,
            profile=profile,
            runtime=await self._runtime_state.read(),
            condition=(condition and parse_unless_damaged(Condition, condition, self._keys.condition)) or Condition(),
        )
        return self._tracker.update(observation)

    def redis_is_away(self) -> list[Event]:
        """Note that `changes` failed because Redis is unreachable, and return the resulting events."""
        return self._tracker.redis_is_away()

    async def best_so_far(self) -> BestSoFar:
        """Return the best candidate so far, with the status of the search."""
        await self._reader.read()
        best, profile = self._reader.history.population.best(), await self._profiles.read(self._spec.fingerprint)
        if best is None or profile is None:
            raise UsageError(f"the search {self._keys.search!r} has measured no candidate yet")
        record = best_record(self._keys.search, self._spec, profile.shape, best)
        try:
            return BestSoFar(record, await self.status())
        except (StoreError, RedisError, OSError):  # the rates are complete without the status
            return BestSoFar(record, None)

    def top(self, count: int) -> list[Evaluation]:
        """Return the best members at the last observation, best first."""
        return self._reader.history.population.top(count)

    async def command(self, command: Command) -> None:
        """Send the command run, pause or stop."""
        await Control(self._redis, self._keys).write(command)


@asynccontextmanager
async def open_remote(search: str, redis_url: str | None, folder: Path) -> AsyncIterator[RemoteSearch]:
    """Open the search called `search` under `redis_url`, or in its embedded server.

    Raises UsageError if there is no such search, or no server answers. Raises SettingsError if the server refuses the
    user or a command, and StoreError if stored data cannot be read. Errors of Redis in the block are converted too.
    """
    keys = Keys(check_search_name(search))
    if redis_url is None:
        folder_of(folder, search)
    redis = connect(redis_url or embedded_url(folder / search))
    client: Any = redis
    found = None
    try:
        text = await client.get(keys.spec)
        if text is None:
            raise UsageError(f"there is no search {search!r} in this Redis")
        found = RemoteSearch(redis, keys, parse_stored(SearchSpec, text, keys.spec))
        yield found
    except BrokenPipeError:  # from stdout, not from Redis
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


def chosen_search(search: str | None, redis_url: str | None, folder: Path) -> str:
    """Return the search that a command is for: the given one, else the only one in `folder`, else `default`.

    Raises UsageError if there are several in `folder`, and none is called `default`.
    """
    if search is not None:
        return search
    found = _names_in(folder) if redis_url is None else []
    if len(found) > 1 and "default" not in found:
        raise UsageError(f"there are {len(found)} searches in {folder}/; choose with --search: {', '.join(found)}")
    return found[0] if len(found) == 1 else "default"


async def search_names(redis_url: str | None, folder: Path) -> list[str]:
    """Return the names of all searches on the server, or in `folder` if there is no server, sorted.

    Raises UsageError if the server does not answer.
    """
    if redis_url is None:
        return _names_in(folder)
    redis = connect(redis_url)
    begin, end = Keys("?").spec.split("?")
    try:
        keys = [key async for key in redis.scan_iter(match=f"{begin}*{end}", count=1000)]
    except (RedisError, OSError) as error:
        raise permanent_error(error) or NotRunning(f"no server answers at --redis-url ({error})") from None
    finally:
        await redis.aclose()
    return sorted({name for key in keys if SEARCH_NAME.fullmatch(name := key[len(begin) : -len(end)])})


async def statuses(redis_url: str | None, folder: Path) -> dict[str, Status | None]:
    """Return the status of every search on the server or in `folder`; None for one that cannot be read."""
    found: dict[str, Status | None] = {}
    for name in await search_names(redis_url, folder):
        try:
            found[name] = await ask(name, redis_url, folder, RemoteSearch.status, saved_status)
        except SelfPrunerError:
            found[name] = None
    return found


def folders_in(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _names_in(folder: Path) -> list[str]:
    """Return the names of the searches in `folder`; an old folder of something else has no log."""
    return [name for name in folders_in(folder) if (folder / name / LOG).exists()]


def folder_of(folder: Path, search: str) -> Path:
    """Return the folder of `search` in `folder`. Raises UsageError, naming the searches there, if it is not there."""
    if (folder / check_search_name(search)).is_dir():
        return folder / search
    found = folders_in(folder)
    if found:
        raise UsageError(f"there is no search {search!r} in {folder}/; choose with --search: {', '.join(found)}")
    raise UsageError(f"there is no search {search!r} in {folder}/, and no other; set --folder or --redis-url")


def _not_running(folder: Path, search: str) -> str:
    where = f"the search {search!r} in {folder}/ is not running now"
    try:
        status = saved_status(folder / search)
    except UsageError:  # damaged: nothing is known of it
        return f"{where}: `selfpruner run` with its settings resumes it"
    if status is not None and status.finished:
        return f"the search {search!r} in {folder}/ has finished; a larger search.max_evaluations lengthens it"
    if status is None or status.measured == 0:
        where = f"the search {search!r} in {folder}/ has measured no candidate yet, and is not running now"
    return f"{where}: `selfpruner run` with its settings resumes it; if its server is elsewhere, give --redis-url"


def saved_status(folder: Path) -> Status | None:
    """Return the last status of the search in `folder`, without daemon and workers; None if the search never began."""
    record = saved(folder, STATUS_FILE)
    if record is None:
        return None
    try:
        status = Status.model_validate(record)
    except ValidationError as error:
        raise UsageError(f"{folder / STATUS_FILE} was written by another version, or is damaged") from error
    left = status.queue.queued + status.queue.running
    return status.model_copy(update={"daemon": None, "workers": (), "queue": QueueDepth(queued=left)})


def saved_best(folder: Path) -> BestSoFar | None:
    """Return the best candidate of the search in `folder`, with its last status; None if no candidate was measured."""
    record = saved(folder, BEST)
    if record is None:
        return None
    try:
        return BestSoFar(record, saved_status(folder))
    except UsageError:  # the rates are complete without the status
        return BestSoFar(record, None)


async def ask(
    search: str,
    redis_url: str | None,
    folder: Path,
    question: Callable[[RemoteSearch], Awaitable[T]],
    otherwise: Callable[[Path], T | None],
) -> T:
    """Return the answer of a running search to `question`.

    If a search with an embedded server is not running, return the result of `otherwise` for its folder. Raises
    NotRunning if that is None.
    """
    try:
        async with open_remote(search, redis_url, folder) as remote:
            return await question(remote)
    except NotRunning:
        found = otherwise(folder / search) if redis_url is None else None
        if found is None:
            raise
        return found


async def best_so_far(search: str, redis_url: str | None, folder: Path) -> BestSoFar:
    """Return the best candidate of a running search, or of a search that ran on this machine and has ended."""
    return await ask(search, redis_url, folder, RemoteSearch.best_so_far, saved_best)
