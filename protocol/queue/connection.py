"""Connections to Redis (or Valkey), and the one retry policy for their commands."""

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
UNREACHABLE_ERRORS = (RedisConnectionError, RedisTimeoutError, OSError)
"""Errors that a Redis client raises while the server is down, restarting, loading or unreachable."""

TRANSIENT_ERRORS = (
    ClusterDownError,  # MASTERDOWN too
    ExecAbortError,
    NoScriptError,  # the client reloads scripts, so it is raised only if they are flushed repeatedly
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
TRANSIENT_CODES = frozenset({"BUSY", "DENIED", "LOADING", "MISCONF", "NOREPLICAS", "UNBLOCKED"})
"""Errors that end by themselves or after an operator's action. Errors without a client class are known by their code.

If the server answers a command with one of these errors, it has not executed the command. A failover unblocks readers
(UNBLOCKED), and another client's long script keeps the server BUSY.
"""
HANDLED_CODES = ("BUSYGROUP", "NOGROUP")
"""Codes of errors that the caller of a command expects and handles."""

BLOCK_MILLISECONDS = 1_000
"""Maximum time that a read of a stream blocks. It is well below the socket's timeout, and below the two seconds within
which a pause takes effect."""

log = structlog.get_logger()


def connect(url: str) -> Redis:
    """Return a client for `url` that does not retry by itself: RedisRetry is the one retry layer.

    By default the library repeats a command ten times. A command that timed out may have been executed, so only
    idempotent commands may be repeated, and their callers decide that.

    Bytes that are not UTF-8 are read as U+FFFD. The code that reads such a value then reports invalid text. A strict
    client would fail in the middle of a reply.
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
    """Return `url` if a client accepts it, else raise SettingsError, which does not show the URL."""
    try:
        parts = urlsplit(url)
        if (parts.scheme == "unix" and not parts.path) or parts.port == 0 or not url.isprintable():
            raise ValueError
        (parts.hostname or "").encode("idna")  # connecting does the same, and would report a failure as an outage
        pool: Any = Redis.from_url(url).connection_pool
        connection = pool.make_connection()  # rejects unknown options; opens no connection
        if isinstance(connection, SSLConnection):
            connection.ssl_context.get()  # reads the files named in the options
    except OSError as error:
        raise SettingsError(f"redis.url: its TLS files cannot be used ({error})") from None
    except (AttributeError, RedisError, TypeError, ValueError):
        raise SettingsError(
            "redis.url is not a Redis URL: use redis://host:port/0, rediss://… or unix:///path"
        ) from None  # the URL may hold a password
    return url


def with_password(url: str, password_file: Path | None) -> str:
    """Return `url` with the password from `password_file`, if there is one. A trailing newline is ignored.

    Raises SettingsError if the file cannot be read or is empty, or if the URL already has a password.
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
        raise SettingsError("redis.url has a password already: remove it from the URL, or do not set a password file")
    user, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl()


def password_of(url: str) -> list[str]:
    """Return the password in `url`, URL-encoded and plain, so that logs can hide both; empty without a password."""
    password = urlsplit(check_url(url)).password
    return sorted({password, unquote(password)}) if password else []


class _Availability:
    """Whether a client's server answers. Each outage is logged once, and so is its end."""

    def __init__(self) -> None:
        self.waiting = 0
        """Number of operations that have failed and are being retried."""
        self.has_ever_answered = False
        """Whether an operation has ever succeeded, which shows that URL, user and password were right."""
        self._is_down = False
        self._up_since = 0.0

    def mark_down(self, what: str, error: BaseException, started: float) -> None:
        """Log an outage when an attempt fails. An attempt from before the server's return shows no new outage."""
        if not self._is_down and started >= self._up_since:
            self._is_down = True
            log.warning("redis_unreachable", redis=what, error=str(error) or type(error).__name__)

    def mark_up(self, what: str) -> None:
        """Log the end of the outage."""
        if self._is_down:
            self._is_down = False
            self._up_since = time.monotonic()
            log.info("redis_back", redis=what)


class _Attempts:
    """The attempts of one operation. After its first failure, it counts as waiting until the end of the block."""

    def __init__(self, availability: _Availability, what: str) -> None:
        self._availability, self._what = availability, what
        self._is_waiting = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._availability.waiting -= self._is_waiting

    def failed(self, error: BaseException, started: float) -> bool:
        """Record that the attempt that began at `started` failed. Returns True for the operation's first failure."""
        first = not self._is_waiting
        self._availability.waiting += first
        self._is_waiting = True
        self._availability.mark_down(self._what, error, started)
        return first

    def succeeded(self) -> None:
        """Record success, which ends the outage if this operation had failed, or if no operation is waiting.

        Success of another operation does not end it, because a full server still reads while it refuses writes.
        """
        self._availability.has_ever_answered = True
        if self._is_waiting or not self._availability.waiting:
            self._availability.mark_up(self._what)


_availabilities: WeakKeyDictionary[Redis, _Availability] = WeakKeyDictionary()


class RedisRetry:
    """Repeats an idempotent operation until the server answers.

    Each outage is logged once and its end once, even if many operations wait on the client `redis`. `outages` counts
    the operations that found the server down. Code that declares another process dead after a timeout must not do so
    right after an outage.
    """

    def __init__(self, redis: Redis, what: str, *, longest_wait: float = 5.0) -> None:
        self._availability = _availabilities.setdefault(redis, _Availability())
        self._what = what
        self._longest_wait = longest_wait
        self.outages = 0

    async def __call__(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `operation`. Waits while the server is down, without a time limit."""
        task = asyncio.current_task()
        cancelled_before = task.cancelling() if task else 0
        retrying = AsyncRetrying(
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=0.1, max=self._longest_wait),
            reraise=True,
        )
        with _Attempts(self._availability, self._what) as attempts:
            async for attempt in retrying:
                with attempt:
                    result = await self._attempt(operation, attempts)
                    # The client sends through asyncio.wait_for, which on Python 3.11 loses a cancellation that arrives
                    # as the sending completes (cpython #86296). A caller's loop would then never end.
                    if task and task.cancelling() > cancelled_before:
                        raise asyncio.CancelledError
        return result

    async def _attempt(self, operation: Callable[[], Awaitable[T]], attempts: _Attempts) -> T:
        started = time.monotonic()
        try:
            result = await operation()
        except (RedisError, OSError) as error:
            if refusal := permanent_error(error, first_contact=not self._availability.has_ever_answered):
                raise refusal from None
            if is_transient(error):
                self.outages += attempts.failed(error, started)
            raise
        attempts.succeeded()
        return result


async def check_server(redis: Redis) -> None:
    """Raise StoreError unless the server is a primary of version 7 or later, without eviction and not in a cluster."""
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
        raise StoreError("the server is a cluster node; use a standalone server")


def is_transient(error: BaseException) -> bool:
    """Whether waiting helps: the server is unreachable, or refuses commands for now (failover, full memory)."""
    if isinstance(error, ResponseError):
        passes = isinstance(error, TRANSIENT_ERRORS) or _error_code(error) in TRANSIENT_CODES
        return passes or "Script killed by user" in str(error)
    return isinstance(error, (*UNREACHABLE_ERRORS, InvalidResponse))


def permanent_error(error: Exception, *, first_contact: bool = True) -> SelfPrunerError | None:
    """Return our error for a failure that waiting does not fix; None if it is transient or callers handle it.

    Failures that a wrong URL or password explains are permanent only at the `first_contact`. After the server has
    answered once, such a failure means that an operator is changing something, and a running search waits until the
    operator has finished.
    """
    if first_contact and (refusal := _connection_error(error)):
        return refusal
    if is_transient(error):
        return None
    if isinstance(error, NoPermissionError) or "ACL failure in script" in str(error):
        return SettingsError(f"redis.url: the server refuses its user a command ({error})")
    if isinstance(error, AskError | ClusterCrossSlotError):  # MOVED too
        return SettingsError(f"redis.url: the server is a cluster node; use a standalone server ({error})")
    if not isinstance(error, ResponseError) or _error_code(error) in HANDLED_CODES:
        return None
    if _error_code(error) == "WRONGTYPE" or "not an integer" in str(error):
        return StoreError(f"a key of the search in Redis was changed by another program ({error})")
    return StoreError(f"the Redis server answers with an error: {error}")


def _connection_error(error: Exception) -> SettingsError | None:
    """Return our error if redis.url does not fit the server that answers there."""
    causes = [error, *_causes(error)]
    if any(isinstance(each, AuthenticationError) for each in causes):  # some versions say so in the cause alone
        return SettingsError(f"redis.url: the server refuses the user or the password ({error})")
    if isinstance(error, ResponseError) and _error_code(error) == "DENIED":
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


def _error_code(error: ResponseError) -> str:
    """Return the code at the beginning of an error answer. The text of errors without a client class contains it.

    In a pipeline the client prefixes the answer with the command that caused it, and formats the answer as a tuple.
    """
    return str(error).rpartition("caused error: ")[2].lstrip("('\"").partition(" ")[0]


def is_missing_group(error: ResponseError) -> bool:
    """Whether the error says that a stream or its consumer group does not exist."""
    return _error_code(error) == "NOGROUP"
