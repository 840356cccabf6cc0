"""Connecting to Redis (or Valkey), and waiting patiently while it is away."""

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakKeyDictionary

import structlog
from redis.asyncio import Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterCrossSlotError,
    ClusterDownError,
    ExecAbortError,
    InvalidResponse,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from tenacity import AsyncRetrying, retry_if_exception, wait_random_exponential

from protocol.errors import SelfPrunerError, SettingsError, StoreError
from protocol.runtime.secret_files import read_secret

T = TypeVar("T")
AWAY = (RedisConnectionError, RedisTimeoutError, OSError)
"""What a Redis client raises while the server is down, restarting, loading or out of reach."""

PASSING_ERRORS = (
    ClusterDownError,  # MASTERDOWN too
    ExecAbortError,
    NoScriptError,  # the client has loaded the script again, and somebody flushes scripts all the time
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
PASSING_WORDS = frozenset({"BUSY", "DENIED", "LOADING", "MISCONF", "NOREPLICAS", "UNBLOCKED"})
"""Error answers that end by themselves or by an operator: as the client's classes, else by the word that begins them.

The server has not executed a command that it answers so. A failover unblocks readers (UNBLOCKED), another client's long
script keeps the server BUSY.
"""
HANDLED_WORDS = ("BUSYGROUP", "NOGROUP")
"""Error answers that the caller of a command expects and handles."""

BLOCK_MILLISECONDS = 1_000
"""How long a read of a stream blocks. Well below the socket's time limit, and below a pause's two seconds."""

log = structlog.get_logger()


def connect(url: str) -> Redis:
    """A client for `url` that does not retry by itself: `patiently` is the one retry layer.

    The library's own default repeats a command ten times; a command that timed out may have been executed, so only
    commands that are safe to repeat may be repeated, and that is decided here, not in the client.

    Bytes that are not UTF-8 are read as U+FFFD: the reader of a value finds text that is wrong and handles it as such,
    where a strict client would fail in the middle of a reply.
    """
    check_url(url)
    return Redis.from_url(
        url,
        decode_responses=True,
        encoding_errors="replace",
        socket_timeout=10,
        socket_connect_timeout=5,
        retry=Retry(NoBackoff(), 0),
    )


def check_url(url: str) -> str:
    """Return `url` if a client can be made of it, else raise SettingsError, which does not show it."""
    try:
        parts = urlsplit(url)
        if (parts.scheme == "unix" and not parts.path) or parts.port == 0 or not url.isprintable():
            raise ValueError
        (parts.hostname or "").encode("idna")  # as connecting does, which takes a failure for an outage
        pool: Any = Redis.from_url(url).connection_pool
        connection = pool.make_connection()  # which tells unknown options; nothing is connected
        if isinstance(connection, SSLConnection):
            connection.ssl_context.get()  # reads the files that the options name
    except OSError as error:
        raise SettingsError(f"redis.url: the files for TLS that it names cannot be used ({error})") from None
    except (AttributeError, RedisError, TypeError, ValueError):
        raise SettingsError(
            "redis.url is not a Redis URL: use redis://host:port/0, rediss://… or unix:///path"
        ) from None  # the URL may hold a password
    return url


def with_password(url: str, password_file: Path | None) -> str:
    """`url` with the password that `password_file` holds, where there is one; a trailing newline does not count.

    Raises SettingsError for a file that cannot be read or is empty, and for a URL that has a password already.
    """
    if password_file is None:
        return url
    try:
        password = read_secret(password_file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"redis.password_file {str(password_file)!r} cannot be read: {reason}") from None
    if not password:
        raise SettingsError(f"redis.password_file {str(password_file)!r} is empty")
    parts = urlsplit(check_url(url))
    if parts.password is not None:
        raise SettingsError("redis.url has a password already: leave it out of the URL, or leave out the password file")
    user, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl()


def password_of(url: str) -> list[str]:
    """The password in `url`, for a log to blank: as it is, and as the URL writes it; empty where there is none."""
    password = urlsplit(check_url(url)).password
    return sorted({password, unquote(password)}) if password else []


class _Outage:
    """Whether a client's server is away: told once when the first who uses it notices, and once when one is back."""

    def __init__(self) -> None:
        self.waiting = 0
        """Operations that have failed and are tried again."""
        self.has_answered = False
        """Whether an operation has ever succeeded: the URL, the user and the password were right."""
        self._is_away = False
        self._back_since = 0.0

    def begins(self, what: str, error: BaseException, asked: float) -> None:
        """An operation that was tried at `asked` has failed; one from before the server's return is no news."""
        if not self._is_away and asked >= self._back_since:
            self._is_away = True
            log.warning("redis_unreachable", redis=what, error=str(error) or type(error).__name__)

    def ends(self, what: str) -> None:
        """What failed in it has succeeded, or nobody waits any more and something else has."""
        if self._is_away:
            self._is_away = False
            self._back_since = time.monotonic()
            log.info("redis_back", redis=what)


class _Tries:
    """One operation and its part in an outage, until the end of the block."""

    def __init__(self, outage: _Outage, what: str) -> None:
        self._outage, self._what = outage, what
        self._waits = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._outage.waiting -= self._waits

    def failed(self, error: BaseException, asked: float) -> bool:
        """The try that began at `asked` found the server away; True for the first one."""
        first = not self._waits
        self._outage.waiting += first
        self._waits = True
        self._outage.begins(self._what, error, asked)
        return first

    def succeeded(self) -> None:
        """It has; which says nothing of those that wait if this one never did: a full server reads and writes not."""
        self._outage.has_answered = True
        if self._waits or not self._outage.waiting:
            self._outage.ends(self._what)


_outages: WeakKeyDictionary[Redis, _Outage] = WeakKeyDictionary()


class Patience:
    """Repeats an operation that is safe to repeat until the server answers.

    An outage is logged once and the return once, however many wait on the client `redis`. `outages` counts how often
    the server was away: whoever judges by time that another process is dead must not do so right after one.
    """

    def __init__(self, redis: Redis, what: str, *, longest_wait: float = 5.0) -> None:
        self._outage = _outages.setdefault(redis, _Outage())
        self._what = what
        self._longest_wait = longest_wait
        self.outages = 0

    async def __call__(self, operation: Callable[[], Awaitable[T]]) -> T:
        """The result of `operation`, however long the server stays away."""
        task = asyncio.current_task()
        cancelled_before = task.cancelling() if task else 0
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_away),
            wait=wait_random_exponential(multiplier=0.1, max=self._longest_wait),
            reraise=True,
        )
        with _Tries(self._outage, self._what) as tries:
            async for attempt in retrying:
                with attempt:
                    result = await self._tried(operation, tries)
                    # The client sends through asyncio.wait_for, which on Python 3.11 loses a cancellation that arrives
                    # as the sending completes (cpython #86296). A loop around us would then go on for ever.
                    if task and task.cancelling() > cancelled_before:
                        raise asyncio.CancelledError
        return result

    async def _tried(self, operation: Callable[[], Awaitable[T]], tries: _Tries) -> T:
        asked = time.monotonic()
        try:
            result = await operation()
        except (RedisError, OSError) as error:
            if refusal := refusal_of(error, first_contact=not self._outage.has_answered):
                raise refusal from None
            if is_away(error):
                self.outages += tries.failed(error, asked)
            raise
        tries.succeeded()
        return result


async def check_server(redis: Redis) -> None:
    """Raise StoreError unless the server is one whose data may be trusted: version 7 or later, never evicting."""
    info = await redis.info()
    version = str(info.get("redis_version", "0"))
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) < 7:
        raise StoreError(f"the server speaks Redis {version}; Redis 7 or Valkey 7.2 or later is needed")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreError(
            f"the server's maxmemory-policy is {policy}, which may delete a search's data; set it to noeviction"
        )
    if info.get("role") == "slave":
        raise StoreError("the server is a read-only replica; give the primary's URL")
    if info.get("cluster_enabled"):
        raise StoreError("the server is a node of a cluster; a search needs a server that is not")


def is_away(error: BaseException) -> bool:
    """Whether waiting helps: the server is out of reach, or refuses commands for now (a failover, a full memory)."""
    if isinstance(error, ResponseError):
        passes = isinstance(error, PASSING_ERRORS) or _word(error) in PASSING_WORDS
        return passes or "Script killed by user" in str(error)
    return isinstance(error, (*AWAY, InvalidResponse))


def refusal_of(error: Exception, *, first_contact: bool = True) -> SelfPrunerError | None:
    """Our error for what no waiting changes; None for an error that passes, or that callers handle.

    What a wrong URL or password causes counts at the `first_contact` alone: where the server has answered before, its
    operator is changing something, and a search that runs waits for the end of that.
    """
    if first_contact and (refusal := _refused_contact(error)):
        return refusal
    if is_away(error):
        return None
    if isinstance(error, NoPermissionError) or "ACL failure in script" in str(error):
        return SettingsError(f"redis.url: the server refuses its user a command ({error})")
    if isinstance(error, AskError | ClusterCrossSlotError):  # MOVED too
        return SettingsError(f"redis.url: the server is a node of a cluster; a search needs one that is not ({error})")
    if not isinstance(error, ResponseError) or _word(error) in HANDLED_WORDS:
        return None
    if _word(error) == "WRONGTYPE" or "not an integer" in str(error):
        return StoreError(f"a key of the search in Redis was changed by another program ({error})")
    return StoreError(f"the Redis server answers with an error: {error}")


def _refused_contact(error: Exception) -> SettingsError | None:
    """Our error where redis.url does not fit the server that answers there."""
    causes = [error, *_causes(error)]
    if any(isinstance(each, AuthenticationError) for each in causes):  # some versions say so in the cause alone
        return SettingsError(f"redis.url: the server refuses the user or the password ({error})")
    if isinstance(error, ResponseError) and _word(error) == "DENIED":
        return SettingsError(f"redis.url: the server accepts no connection from this machine ({error})")
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in causes):
        return SettingsError(
            f"redis.url: the server's certificate is not trusted ({error}); "
            "?ssl_ca_certs=FILE in the URL names the authority that signed it"
        )
    if any(isinstance(each, ssl.SSLError) for each in causes):
        return SettingsError(f"redis.url: no TLS connection is possible ({error}); without TLS it is redis://…")
    if isinstance(error, InvalidResponse):
        return SettingsError(f"redis.url: the server there is not Redis or Valkey ({error})")
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__ or error.__context__) is not None:
        yield cause
        error = cause


def _word(error: ResponseError) -> str:
    """The word that begins an error answer; the client keeps it where it has no class for it.

    In a pipeline the client puts before the answer which command caused it, and writes the answer as a tuple.
    """
    return str(error).rpartition("caused error: ")[2].lstrip("('\"").partition(" ")[0]


def is_missing_group(error: ResponseError) -> bool:
    """Whether the server says that a stream or its consumer group is gone."""
    return _word(error) == "NOGROUP"
