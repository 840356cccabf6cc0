"""How commands answer: one JSON object, or lines for a person; and what they say when a package is missing."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import structlog
from rich.console import Console, RenderableType

from daemon.settings.packages import need
from protocol.runtime import logs
from protocol.runtime.signals import interruptible

log = structlog.get_logger()

UNWRAPPED = 1000
"""Columns of an output that is no terminal: a table in a file is not cut to the width of a screen that is not there."""


def answer(answer: dict[str, Any], json_: bool, in_words: Callable[[], Iterable[RenderableType]]) -> None:
    """Print an answer: one JSON object, or what `in_words` makes of it for a person."""
    if json_:
        print_json(answer)
        return
    console = stdout_console()
    for part in in_words():
        console.print(part, soft_wrap=isinstance(part, str))


def print_json(answer: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(answer, allow_nan=False, ensure_ascii=False) + "\n")


def stdout_console() -> Console:
    """Stdout for tables and lines; names of models and texts are no markup."""
    width = None if sys.stdout.isatty() else UNWRAPPED
    return Console(width=width, markup=False, highlight=False, emoji=False)


@contextmanager
def at_work(model: str, *, as_elsewhere: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Say what is under way: on one line of a terminal, elsewhere in the log; a signal raises Interrupted.

    Flags are checked before it, for it imports torch, which takes seconds. `as_elsewhere`: torch computes as it does
    without us, for whoever wants to know how fast that is.
    """
    need("torch", "worker")
    logs.configure()
    with ExitStack() as stack:
        stack.enter_context(interruptible())
        on_terminal = sys.stderr.isatty()
        line = stack.enter_context(Console(stderr=True).status("loading torch")) if on_terminal else None
        from gpu_worker.evaluation.outcomes import out_of_memory_as_usage_error
        from gpu_worker.measuring.half_precision import products_in_float32
        from gpu_worker.progress import LogThrottle

        stack.enter_context(out_of_memory_as_usage_error(model))
        if not as_elsewhere:
            stack.enter_context(products_in_float32())
        logged = LogThrottle()

        def tell(stage: str, done: int, total: int) -> None:
            if line is not None:
                line.update(f"{stage} {done}/{total}")
            elif logged.should_log(stage, done, total):
                left = logged.seconds_left(done, total)
                log.info("progress", stage=stage, done=done, total=total, seconds_left=left)

        yield tell
