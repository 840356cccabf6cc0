"""Output of commands: results as JSON or as tables, and progress."""

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import structlog
from rich.console import Console, RenderableType

from daemon.monitor.report import REPORT
from daemon.settings.packages import need
from daemon.settings.settings import Settings
from protocol.runtime import logs
from protocol.runtime.signals import interruptible

log = structlog.get_logger()

UNWRAPPED = 1000
"""Width of tables, in characters, if stdout is not a terminal. Tables in files are not cut to the width of a screen."""


def print_result(result: dict[str, Any], json_: bool, tables: Callable[[], Iterable[RenderableType]]) -> None:
    """Print a result as one JSON object, or as the `tables` and lines made from it."""
    if json_:
        print_json(result)
        return
    console = stdout_console()
    for part in tables():
        if isinstance(part, str):
            console.print(_printable(part), soft_wrap=True)
        else:
            console.print(part)


def _printable(text: str) -> str:
    """Return the text without escape sequences of terminals, which names of models and files may hold."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(result, allow_nan=False, ensure_ascii=False) + "\n")


def stdout_console() -> Console:
    """Return a console on stdout; names of models and texts are not interpreted as markup.

    Characters that stdout cannot encode are printed as question marks.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    width = None if sys.stdout.isatty() else UNWRAPPED
    return Console(width=width, markup=False, highlight=False, emoji=False)


@contextmanager
def show_progress(model: str, *, stock_torch: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of the block: on one line of a terminal, elsewhere in the log. A signal raises Interrupted.

    Check flags before entering the block, because this imports torch, which takes seconds. `stock_torch` leaves torch's
    settings unchanged, to measure how fast models run without Self-Pruner.
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
        if not stock_torch:
            stack.enter_context(products_in_float32())
        logged = LogThrottle()

        def show(stage: str, done: int, total: int) -> None:
            if line is not None:
                line.update(f"{stage} {done}/{total}")
            elif logged.should_log(stage, done, total):
                left = logged.seconds_left(done, total)
                log.info("progress", stage=stage, done=done, total=total, seconds_left=left)

        yield show


def name_charts(settings: Settings) -> None:
    """Print where the report of a search is, if it was written."""
    if (report := settings.folder / REPORT).is_file():
        stdout_console().print(f"charts: {report}", soft_wrap=True)
