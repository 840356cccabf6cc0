"""Ending on SIGINT and SIGTERM: the first one asks the work to save and end, the second one ends the process."""

import asyncio
import os
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog

from protocol.runtime.signals import ENDING, at_first_signal

T = TypeVar("T")

log = structlog.get_logger()


def run_until_signal(work: Coroutine[Any, Any, T]) -> tuple[T | None, signal.Signals | None]:
    """Run `work`; a first signal cancels it, and is returned beside whatever the work still answered."""
    return asyncio.run(_run(work))


class Interrupted(BaseException):
    """A signal ended work that has no event loop to cancel. No Exception: nobody on the way may take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number
        self.left = "nothing was written"
        """What it leaves behind, for the one sentence."""


@contextmanager
def interruptible() -> Iterator[None]:
    """While it lasts, a first signal raises Interrupted in the main thread; a second one ends the process at once."""

    def interrupt(number: int) -> None:
        raise Interrupted(number)

    with at_first_signal(interrupt):
        yield


async def until_cancelled() -> None:
    """Wait for ever."""
    await asyncio.Event().wait()


async def _run(work: Coroutine[Any, Any, T]) -> tuple[T | None, signal.Signals | None]:
    received: list[signal.Signals] = []
    task = asyncio.ensure_future(work)

    def on_signal(number: signal.Signals) -> None:
        if received:
            os._exit(128 + number)  # children are on a leash (daemon.local.leash) and end by themselves
        received.append(number)
        log.info("ending", signal=number.name)
        task.cancel()

    for number in ENDING:
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    try:
        return await task, received[0] if received else None
    except asyncio.CancelledError:
        return None, received[0] if received else None
