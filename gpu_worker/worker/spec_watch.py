"""Cancels the preparation of a model, which may take hours, when the search no longer needs the model's spec."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from redis.exceptions import RedisError

from protocol.errors import SelfPrunerError, StoreError
from protocol.plans.spec import SearchSpec
from protocol.queue.control import Command

POLL_SECONDS = 1.0
LAST_POLL_SECONDS = 2.0
"""Time limit in seconds of the poll after a failed preparation, which must not hang if the server is down."""
T = TypeVar("T")


class SpecWithdrawn(SelfPrunerError):  # noqa: N818  (not an error: the search has changed)
    """The search no longer needs this spec; the message says why."""


class SpecWatch:
    """Watches whether a search still needs one spec.

    `read_spec` and `read_command` query the server. A missing spec counts as withdrawn only after `patience_seconds`,
    because a daemon restores its spec after the server has lost data.
    """

    def __init__(
        self,
        fingerprint: str,
        read_spec: Callable[[], Awaitable[SearchSpec | None]],
        read_command: Callable[[], Awaitable[Command]],
        *,
        patience_seconds: float,
    ) -> None:
        self._fingerprint = fingerprint
        self._read_spec = read_spec
        self._read_command = read_command
        self._patience = patience_seconds
        self._missing_since: float | None = None

    async def run(self, preparation: Coroutine[Any, Any, T]) -> T:
        """Return the result of `preparation`; cancel the preparation when the search withdraws the spec.

        Raises SpecWithdrawn after cancelling. Also raises it instead of the preparation's error if the spec was
        withdrawn, because the error of a model that no search needs must not end the worker.
        """
        preparing = asyncio.ensure_future(preparation)
        withdrawal = asyncio.create_task(self._until_withdrawn())
        try:
            await asyncio.wait({preparing, withdrawal}, return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done():
                raise SpecWithdrawn(withdrawal.result())
            if preparing.exception() and (reason := await self._last_poll()):
                raise SpecWithdrawn(reason) from preparing.exception()
            return preparing.result()
        finally:
            preparing.cancel()
            withdrawal.cancel()
            await asyncio.gather(preparing, withdrawal, return_exceptions=True)

    async def _until_withdrawn(self) -> str:
        """Wait until the spec is withdrawn; return the reason."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if reason := await self._poll():
                return reason

    async def _last_poll(self) -> str:
        try:
            return await asyncio.wait_for(self._poll(), LAST_POLL_SECONDS)
        except TimeoutError:
            return ""

    async def _poll(self) -> str:
        """Return why the spec is withdrawn; an empty string if it is not withdrawn or the server cannot be read."""
        try:
            spec, command = await self._read_spec(), await self._read_command()
        except (StoreError, RedisError):
            return ""
        if spec is None:
            return self._missing()
        self._missing_since = None
        if spec.fingerprint != self._fingerprint:
            return f"the search has another spec ({spec.fingerprint})"
        return "the search is stopped" if command == "stop" else ""

    def _missing(self) -> str:
        now = time.monotonic()
        self._missing_since = now if self._missing_since is None else self._missing_since
        gone = now - self._missing_since >= self._patience
        return f"the search has been gone for {self._patience:g} seconds" if gone else ""
