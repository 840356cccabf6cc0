"""Answering the first SIGINT or SIGTERM; a second one ends the process at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

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
