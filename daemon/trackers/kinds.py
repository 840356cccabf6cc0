"""The trackers: the packages that each needs, and the environment of its process."""

import os
from dataclasses import dataclass
from pathlib import Path

from daemon.settings.packages import need
from daemon.settings.service import TrackerName
from daemon.settings.settings import Settings
from protocol.errors import SettingsError
from protocol.runtime.environment import child_environment


@dataclass(frozen=True)
class Kind:
    """A tracker."""

    packages: tuple[str, ...]
    own: tuple[str, ...] = ()
    """Beginnings of the names of its variables, which its process gets even if they hold secrets."""


KINDS: dict[TrackerName, Kind] = {
    "tensorboard": Kind(("tensorboard",)),
    "mlflow": Kind(("mlflow", "sqlalchemy", "alembic"), ("MLFLOW_", "AWS_", "AZURE_", "GOOGLE_", "DATABRICKS_")),
    "wandb": Kind(("wandb",), ("WANDB_",)),
    "trackio": Kind(("trackio",), ("TRACKIO_", "HF_")),
}


def check_trackers(settings: Settings) -> None:
    """Raise SettingsError if a chosen tracker is not installed, or if its data cannot lie in the search's folder."""
    if "mlflow" in settings.run.trackers and "MLFLOW_TRACKING_URI" not in os.environ:
        place = str(settings.folder.absolute())
        if odd := [character for character in "?#%" if character in place]:
            raise SettingsError(
                f"MLflow cannot keep its database in {place!r}, because of the {odd[0]!r}: choose another "
                "run.folder, or set MLFLOW_TRACKING_URI"
            )
    for name in settings.run.trackers:
        for package in KINDS[name].packages:
            need(package, name, f"the tracker {name} (run.trackers)")


def environment(name: TrackerName, folder: Path) -> dict[str, str]:
    """Return the environment of a tracker's process. Its data goes to `folder` unless the user's variables differ."""
    return _defaults(name, folder.absolute()) | child_environment(own=KINDS[name].own)


def _defaults(name: TrackerName, folder: Path) -> dict[str, str]:
    match name:
        case "tensorboard":
            return {}
        case "mlflow":
            return {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"}
        case "wandb":
            places = dict.fromkeys(("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"), str(folder))
            return {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"} | places
        case "trackio":
            # Without a Space, there is no need to ask the Hub who the user is.
            return {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "0" if os.environ.get("TRACKIO_SPACE_ID") else "1"}
