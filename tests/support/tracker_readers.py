"""`python -m tests.support.tracker_readers NAME FOLDER`: print what a tracker has kept, as its own reader shows it."""

import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Kept = dict[str, Any]
"""`run`, the run's id; `curves`, lists of [step, value] by name; `settings`; `report`, its text, at the end."""


def tensorboard(folder: Path) -> Kept:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    curves = {name: [[e.step, e.value] for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    (text,) = events.Tensors("settings")[-1].tensor_proto.string_val
    rows = [line.strip("| ").split(" | ", 1) for line in text.decode().splitlines()[2:]]
    return {"run": str(folder), "curves": curves, "settings": {name: value.strip("`") for name, value in rows}}


def mlflow(folder: Path) -> Kept:
    from mlflow import MlflowClient

    assert (folder / "run.json").is_file(), "two processes must not create the database"
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("self-pruner")
    (run,) = client.search_runs([experiment.experiment_id])
    curves = {
        name: [[metric.step, metric.value] for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    artifacts = [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
    assert ("report.html" in artifacts) == (run.info.status == "FINISHED")
    report = client.download_artifacts(run.info.run_id, "report.html") if "report.html" in artifacts else None
    assert run.info.artifact_uri.startswith((folder / "artifacts").as_uri())
    kept = json.loads(Path(client.download_artifacts(run.info.run_id, "settings.json")).read_text())
    assert run.data.params["search.name"] == kept["search"]["name"]
    return {
        "run": run.info.run_id,
        "curves": curves,
        "settings": run.data.params | {"search.rounds": str(kept["search"]["rounds"])},
        "report": Path(report).read_text() if report else None,
    }


def wandb(folder: Path) -> Kept:
    """Read the transaction logs of all processes, as `wandb sync` does. W&B has no reader in Python."""
    from wandb.proto.wandb_internal_pb2 import Record

    curves: dict[str, list[list[float]]] = {}
    settings: dict[str, str] = {}
    runs, artifacts = set(), []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in _records(file.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                runs.add(record.run.run_id)
                for section in record.run.config.update:
                    values = json.loads(section.value_json)
                    settings |= {f"{section.key}.{name}": _text(value) for name, value in values.items()}
            elif record.HasField("history"):
                values = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                for name, value in values.items():
                    curves.setdefault(name, []).append([int(values["_step"]), value])
            elif record.HasField("artifact"):
                artifacts += [entry.local_path for entry in record.artifact.manifest.contents]
    (run,) = runs
    return {
        "run": run,
        "curves": curves,
        "settings": settings,
        "report": Path(artifacts[-1]).read_text() if artifacts else None,
    }


def _records(log: bytes) -> Iterator[bytes]:
    """The records of a log of LevelDB: parts in blocks of 32 KiB, after a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(log):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def trackio(folder: Path) -> Kept:
    os.environ["TRACKIO_DIR"] = str(folder)
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = Api().runs("self-pruner")
    curves: dict[str, list[list[float]]] = {}
    for point in SQLiteStorage.get_logs("self-pruner", run.name):
        for name, value in point.items():
            if isinstance(value, int | float):
                curves.setdefault(name, []).append([point["step"], value])
    settings = {
        f"{section}.{name}": _text(value)
        for section, values in run.config.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    kept: Kept = {"run": run.id, "curves": curves, "settings": settings, "report": None}
    if artifact := SQLiteStorage.get_artifact_manifest("self-pruner", "report.html", None):
        (entry,) = artifact["manifest"]
        (blob,) = folder.rglob(entry["digest"])
        kept["report"] = blob.read_text()
    return kept


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


READERS: dict[str, Callable[[Path], Kept]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "wandb": wandb,
    "trackio": trackio,
}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(READERS[sys.argv[1]](Path(sys.argv[2]))))
