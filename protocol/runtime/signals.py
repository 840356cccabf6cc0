"""Handling of SIGINT and SIGTERM: the first one is handled, a second one ends the process at once."""

import asyncio
import contextvars
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

import structlog

END_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def on_first_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Within the block, the first signal calls `act` with its number. Works only in the main thread."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        for each in END_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        act(number)

    before = {number: signal.signal(number, on_signal) for number in END_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer the first signal until the end of the block.

    Use it for native code that calls back into Python, such as torch.save to an open file. If a signal handler raises
    an exception there, it passes through destructors, which abort the process. Also use it for work that must not be
    interrupted, such as an optimizer step. Does nothing outside the main thread, because only that thread receives
    signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    try:
        with on_first_signal(received.append):
            yield
    finally:
        if received:
            signal.raise_signal(received[0])


T = TypeVar("T")


log = structlog.get_logger()


def run_until_signal(work: Coroutine[Any, Any, T]) -> tuple[T | None, signal.Signals | None]:
    """Run `work`, which the first signal cancels. Returns its result, if any, and that signal, if any."""
    return asyncio.run(_run(work))


def run_in_thread(work: Coroutine[Any, Any, T]) -> tuple[T | None, signal.Signals | None]:
    """Run `work` in a thread with an event loop of its own, for callers that may have a running loop, as notebooks do.

    Ctrl-C cancels it. Returns its result, if any, and SIGINT if it was cancelled so.
    """
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def supervised() -> T | None:
        task = asyncio.ensure_future(work)
        begun.set_result((asyncio.get_running_loop(), task))
        try:
            return await task
        except asyncio.CancelledError:
            return None

    with ThreadPoolExecutor(1, "selfpruner") as pool:
        done = pool.submit(contextvars.copy_context().run, lambda: asyncio.run(supervised()))
        try:
            return done.result(), None
        except KeyboardInterrupt:
            futures: list[Future[Any]] = [begun, done]
            wait(futures, return_when=FIRST_COMPLETED)
            if begun.done():
                loop, task = begun.result()
                with suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(task.cancel)
            return done.result(), signal.SIGINT


class Interrupted(BaseException):
    """A signal ended work without an event loop. It is not an Exception, so no `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number
        self.left = "nothing was written"
        """The state that the interrupted work leaves behind, in words for the message to the user."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, the first signal raises Interrupted in the main thread; a second one ends the process."""

    def interrupt(number: int) -> None:
        raise Interrupted(number)

    with on_first_signal(interrupt):
        yield


async def until_cancelled() -> None:
    """Wait until cancelled."""
    await asyncio.Event().wait()


async def _run(work: Coroutine[Any, Any, T]) -> tuple[T | None, signal.Signals | None]:
    received: list[signal.Signals] = []
    task = asyncio.ensure_future(work)

    def on_signal(number: signal.Signals) -> None:
        if received:
            os._exit(128 + number)  # children end with this process (daemon.local.end_with_parent)
        received.append(number)
        log.info("ending", signal=number.name)
        task.cancel()

    for number in END_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    try:
        return await task, received[0] if received else None
    except asyncio.CancelledError:
        return None, received[0] if received else None
