"""Holding signals back where an exception in the midst of a call would end the process, or leave half of something."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[None]:
    """A first SIGINT or SIGTERM waits until the end of the block; a second one ends the process at once.

    For calls into native code that calls Python back, such as torch.save to an open file: what a handler raises in
    there passes through destructors that abort. And for what has to be done whole, such as a step of an optimizer. In
    other threads than the main one there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)
        received.append(number)

    before = {number: signal.signal(number, on_signal) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
