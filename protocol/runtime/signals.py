"""Answering the first SIGINT or SIGTERM; a second one ends the process at once."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import structlog

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def at_first_signal(act: Callable[[int], None]) -> Iterator[None]:
    """While it lasts, a first signal calls `act` with its number, in the main thread, which this has to be."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)
        act(number)

    before = {number: signal.signal(number, on_signal) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """A first signal waits until the end of the block.

    For calls into native code that calls Python back, such as torch.save to an open file: what a handler raises in
    there passes through destructors that abort. And for what has to be done whole, such as a step of an optimizer. In
    other threads than the main one there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    try:
        with at_first_signal(received.append):
            yield
    finally:
        if received:
            signal.raise_signal(received[0])


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
            os._exit(128 + number)  # children end with it (daemon.local.end_with_parent)
        received.append(number)
        log.info("ending", signal=number.name)
        task.cancel()

    for number in ENDING:
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    try:
        return await task, received[0] if received else None
    except asyncio.CancelledError:
        return None, received[0] if received else None
