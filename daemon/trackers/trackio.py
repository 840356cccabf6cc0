"""Trackio: a run in an SQLite file in the search's folder, or in TRACKIO_DIR or the Space TRACKIO_SPACE_ID."""

import secrets
from pathlib import Path

import trackio

from daemon.trackers.note import Note
from daemon.trackers.process import End, Start

PROJECT = "self-pruner"


class TrackioRun:
    """One run, which is reopened after a restart."""

    def __init__(self, folder: Path, start: Start) -> None:
        note = Note.read(folder) or Note(id=secrets.token_hex(4))
        note.write(folder)
        self._run = trackio.init(
            project=PROJECT,
            # Trackio knows runs by their names, and several searches may have the same one.
            name=f"{start.search}-{note.id}",
            resume="allow",
            config=start.settings,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.last_step = self._run._next_step - 1

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one point."""
        self._run.log(values, step=step)

    def end(self, end: End) -> None:
        """Add the report as an artifact and close the run."""
        if end.report:
            self._run.log_artifact(end.report, name="report.html", type="report")
        self._run.finish()


def begin(folder: Path, start: Start) -> TrackioRun:
    """Return the run of the search whose tracker's folder is `folder`."""
    return TrackioRun(folder, start)
