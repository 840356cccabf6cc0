"""`python -m daemon.trackers.process NAME FOLDER`: write to one tracker what the daemon sends to stdin.

A tracker is other people's code: it may hang, print, use the processor for seconds while it is imported, or never
return from its exit. None of this affects the daemon, because this process does it. Each line of stdin is JSON: a
Start, then points as `[step, values]`, and an End. stdout gets nothing but the sentence of an error.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn, Protocol

from protocol.plans.value import Value
from protocol.runtime.logs import Redaction

LAST_SECONDS = 10
"""Seconds that a process has left when its daemon has died."""
LONGEST_ERROR = 1000
"""Characters of an error that the daemon is told. More might not fit into the pipe, which is read only at the end."""


class Start(Value):
    """The first line: the search, and its settings without secrets, by section."""

    search: str
    settings: dict[str, Any]

    @property
    def flat(self) -> dict[str, str]:
        """The settings by their dotted names, as text."""
        return {
            f"{section}.{name}": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for section, values in self.settings.items()
            for name, value in values.items()
        }


class End(Value):
    """The last line: whether the search has finished, and the absolute path of its report, if there is one."""

    finished: bool
    report: Path | None


class Tracker(Protocol):
    """One run of a tracker. A module of this wing has a function `begin(folder, start)` that returns it."""

    last_step: int
    """The last step that earlier processes have written; 0 if there is none."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one point to curves."""
        ...

    def end(self, end: End) -> None:
        """Add the report and close the run. A later process may continue it."""
        ...


def main() -> None:
    """Write until the last line, or until the daemon has died."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    errors = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # trackers print to stdout
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SECONDS))  # from daemon/local/end_with_parent.py
    try:
        begin = importlib.import_module(f"daemon.trackers.{name}").begin
        _write(begin, folder)
    except Exception as error:  # noqa: BLE001  (this process has no other purpose, and the daemon logs the sentence)
        sys.stderr.write(Redaction(()).text(traceback.format_exc()))
        sys.stderr.flush()
        errors.write(" ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_ERROR])
        errors.close()
        _exit(1)
    _exit(0)


def _exit(code: int) -> NoReturn:
    """Exit without waiting for what the tracker does at exit."""
    sys.stdout.flush()
    os._exit(code)


def _write(begin: Any, folder: Path) -> None:
    first = sys.stdin.readline()
    if not first:  # the search has ended before it began
        return
    tracker: Tracker = begin(folder, Start.model_validate_json(first))
    end = End(finished=False, report=None)  # if the daemon dies
    for line in sys.stdin:
        if line.startswith("["):
            step, values = json.loads(line)
            if step > tracker.last_step:
                tracker.log(step, values)
        else:
            end = End.model_validate_json(line)
    tracker.end(end)


if __name__ == "__main__":
    main()
