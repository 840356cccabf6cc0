"""TensorBoard: event files in the search's folder, which `tensorboard --logdir` shows. It keeps no reports."""

import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from daemon.trackers.points import ALWAYS
from daemon.trackers.process import End, Start


class EventFiles:
    """The event files of one search, one for each of its processes."""

    def __init__(self, folder: Path, start: Start) -> None:
        self.last_step = _last_step(folder)
        self._writer = EventFileWriter(str(folder))
        # A reader drops what a killed process has written from this step on, such as a part of a point.
        self._add(self.last_step + 1, session_log=SessionLog(status=SessionLog.START))
        rows = [f"| {name} | `{value}` |" for name, value in start.flat.items()]
        self._add(self.last_step, summary=text_pb("settings", "\n".join(["| setting | value |", "| - | - |", *rows])))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one point, and write it at once, so that a running search can be watched."""
        shown = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=Summary(value=shown))

    def end(self, _: End) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, step: int, **content: object) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()


def begin(folder: Path, start: Start) -> EventFiles:
    """Return the event files in `folder`."""
    return EventFiles(folder, start)


def _last_step(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    events = EventAccumulator(str(folder), size_guidance={"scalars": 1}).Reload()
    return events.Scalars(ALWAYS)[-1].step if ALWAYS in events.Tags()["scalars"] else 0
