"""Weights & Biases: an offline run in the search's folder; WANDB_MODE=online in the environment sends it."""

import os
import secrets
from pathlib import Path

import wandb

from daemon.trackers.note import Note
from daemon.trackers.process import End, Start


class WandbRun:
    """One run. Offline, each process writes a folder of its own with the run's id, and `wandb sync` joins them."""

    def __init__(self, folder: Path, start: Start) -> None:
        self._folder = folder
        self._note = Note.read(folder) or Note(id=secrets.token_hex(4))
        self._note.write(folder)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "self-pruner"),
            name=os.environ.get("WANDB_NAME", start.search),
            id=self._note.id,
            resume="allow",
            config=start.settings,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        self.last_step = max(self._note.last_step, self._run.starting_step - 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one point. The step is noted first: after a kill, a point may be missing, but none is there twice."""
        self._note = self._note.model_copy(update={"last_step": step})
        self._note.write(self._folder)
        self._run.log(values, step=step, commit=True)

    def end(self, end: End) -> None:
        """Add the report as an artifact and close the run."""
        if end.report:
            self._run.log_artifact(end.report, name=f"report-{self._run.id}", type="report")
        self._run.finish(exit_code=0 if end.finished else 1)


def begin(folder: Path, start: Start) -> WandbRun:
    """Return the run of the search whose tracker's folder is `folder`."""
    return WandbRun(folder, start)
