"""MLflow: a run in an SQLite file in the search's folder, or at the server in MLFLOW_TRACKING_URI."""

import os
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException

from daemon.trackers.note import Note
from daemon.trackers.points import ALWAYS
from daemon.trackers.process import End, Start

PARAMETERS = 100
"""Maximum number of parameters that MLflow takes at once."""


class MlflowRun:
    """One run, which is reopened after a restart."""

    def __init__(self, folder: Path, start: Start) -> None:
        self._client = MlflowClient()
        run = self._known(folder) or self._new(folder, start)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._client.log_dict(self._id, start.settings, "settings.json")
        # A parameter cannot be changed. settings.json has the settings of the last process.
        new = [Param(name, value) for name, value in start.flat.items() if name not in run.data.params]
        for first in range(0, len(new), PARAMETERS):
            self._client.log_batch(self._id, params=new[first : first + PARAMETERS])
        self.last_step = max((metric.step for metric in self._client.get_metric_history(self._id, ALWAYS)), default=0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one point, in one transaction."""
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def end(self, end: End) -> None:
        """Add the report as an artifact and set the state of the run."""
        if end.report:
            self._client.log_artifact(self._id, str(end.report))
        self._client.set_terminated(self._id, "FINISHED" if end.finished else "KILLED")

    def _known(self, folder: Path) -> Run | None:
        """Return the run of earlier processes, unless it was deleted or the tracking server is another."""
        note = Note.read(folder)
        try:
            run = self._client.get_run(note.id) if note else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run and run.info.lifecycle_stage == "active" else None

    def _new(self, folder: Path, start: Start) -> Run:
        run = self._client.create_run(self._experiment(folder), run_name=start.search)
        Note(id=run.info.run_id).write(folder)
        return run

    def _experiment(self, folder: Path) -> str:
        """Return the id of MLFLOW_EXPERIMENT_NAME, else of `self-pruner`, whose artifacts lie beside a file of ours."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "self-pruner")
        if known := self._client.get_experiment_by_name(name):
            return str(known.experiment_id)
        is_ours = str(folder) in self._client.tracking_uri
        artifacts = (folder / "artifacts").as_uri() if is_ours else None
        return str(self._client.create_experiment(name, artifact_location=artifacts))


def begin(folder: Path, start: Start) -> MlflowRun:
    """Return the run of the search whose tracker's folder is `folder`."""
    return MlflowRun(folder, start)
