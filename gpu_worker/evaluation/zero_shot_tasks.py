"""Loads the tasks of `selfpruner zero-shot`: the paper's tasks from lm-eval, or the tasks in a folder of task files.

Tasks are read before any model is loaded, so that errors in them show within seconds and need no GPU.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import yaml

from gpu_worker.models.checkpoints import reading, reason
from gpu_worker.models.hub import hub_reachable, set_datasets_offline
from gpu_worker.progress import Progress, no_progress, steps
from protocol.errors import DataError, SettingsError
from protocol.results.zero_shot import PAPER_TASKS, Metric, counted_metric, paper_task, select_tasks, unknown_task

SHIPPED = ("arc", "hellaswag", "openbookqa", "piqa", "super_glue/boolq", "winogrande")
"""Folders of the paper's seven tasks in lm-eval. Scanning all tasks of lm-eval takes ten seconds."""
FILE_KINDS = ("json", "csv", "parquet", "text", "arrow")
"""Dataset types that are read from local files."""
ANSWERED_BY_LIKELIHOOD = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data."""

    name: str
    title: str
    metric: Metric
    """The accuracy that is reported."""
    task: Any
    """The zero-shot task object of lm-eval."""

    @property
    def harness_name(self) -> str:
        """Return the name of the task in lm-eval."""
        return str(self.task.config.task)


def load_tasks(
    names: Sequence[str], folder: Path | None, limit: int | None, progress: Progress = no_progress
) -> list[LoadedTask]:
    """Load the named tasks, from `folder` first if given; without names, all tasks of the folder, or the paper's seven.

    Raises SettingsError for an unknown name, DataError for a task or data that cannot be read.
    """
    datasets.disable_progress_bars()
    sources = find_sources(names, None if folder is None else _Folder(folder))
    return [_load(source, limit) for source in steps(progress, "reading tasks", sources)]


@contextmanager
def quiet() -> Iterator[None]:
    """Discard everything that lm-eval and task code print to stdout and stderr, including the log.

    Stdout is reserved for the result, and progress bars on stderr would overwrite the progress line.
    """
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@dataclass(frozen=True)
class _Source:
    """The location of a task."""

    harness_name: str
    manager: Any
    """The TaskManager of lm-eval that has the task."""
    local: bool
    beside: tuple[str, ...] = ()
    """Names of the tasks in the given folder, if the folder does not contain this task."""

    @property
    def config(self) -> dict[str, Any]:
        """Return the content of the task's file, with functions unresolved."""
        return dict(self.manager.task_index[self.harness_name].cfg)

    @property
    def file(self) -> Path:
        return Path(self.manager.task_index[self.harness_name].yaml_path)


class _Folder:
    """A folder with task files. Raises DataError if it has no task, or a task that lm-eval would silently skip."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"there is no folder {str(folder)!r} with tasks")
        self.manager = _manager(folder)
        self.names: tuple[str, ...] = tuple(self.manager.all_subtasks)
        said: dict[str, Path] = {}
        for file in sorted(folder.rglob("*.yaml")):
            name = _task_of(file)
            if name is None:
                continue
            if name in said:
                raise DataError(f"the task {name!r} is in two files: {said[name]} and {file}")
            if name not in self.names:
                raise DataError(
                    f"the task {name!r} of {file} cannot be read; does it include a file that is not there?"
                )
            said[name] = file
        if not self.names:
            raise DataError(f"there is no task in {str(folder)!r}: lm-eval's files end in .yaml and say `task:`")


def _task_of(file: Path) -> str | None:
    """Return the name of the task that a file defines; None for templates and groups."""
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{file} cannot be read as YAML ({reason(error)})") from error
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    said = {key.value: value.value for key, value in pairs if isinstance(value, yaml.ScalarNode)}
    return None if "group" in said else said.get("task")


def _manager(*folders: Path) -> Any:
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=list(folders))


def find_sources(names: Sequence[str], local: _Folder | None) -> list[_Source]:
    """Locate the tasks for `load_tasks`. Raises SettingsError for an unknown name."""
    root = Path(lm_eval.tasks.__file__).parent
    shipped = _manager(*(root / name for name in SHIPPED))
    if local is None:
        return [_Source(task.harness_name, shipped, local=False) for task in select_tasks(names)]
    found: dict[str, _Source] = {}
    for name in names or local.names:
        paper = paper_task(name)
        harness_name = name if paper is None or name in local.names else paper.harness_name
        if harness_name in local.names:
            found[harness_name] = _Source(harness_name, local.manager, local=True)
        elif paper is not None:
            found[harness_name] = _Source(harness_name, shipped, local=False, beside=local.names)
        else:
            seven = (task.name for task in PAPER_TASKS)
            raise SettingsError(unknown_task(name, dict.fromkeys((*local.names, *seven))))
    return list(found.values())


def _load(source: _Source, limit: int | None) -> LoadedTask:
    config = source.config
    offline = config.get("dataset_path") not in FILE_KINDS and not hub_reachable()
    if offline:
        set_datasets_offline()
    with quiet(), reading(partial(_cannot_load, source, offline), DataError):
        task = _built(source, config)
        task.set_config(key="num_fewshot", value=0)
        if source.local:
            _check(source, task, limit)
    name = source.harness_name
    paper = paper_task(name)
    metric = counted_metric(name) if counted_metric(name) in task.aggregation() else "acc"
    return LoadedTask(paper.name if paper else name, paper.title if paper else name, metric, task)


def _built(source: _Source, config: dict[str, Any]) -> Any:
    """Build lm-eval's task with its data. Data files are first looked up relative to the task's file."""
    kwargs = config.get("dataset_kwargs") or {}
    beside = {key: _beside(value, source.file.parent) for key, value in kwargs.items() if key.startswith("data_")}
    spec: Any = source.harness_name
    if beside:
        # In lm-eval, a group can override the settings of a task's file.
        changed = {"task": source.harness_name, "dataset_kwargs": {**kwargs, **beside}}
        spec = {"group": "changed", "task": [changed]}
    (task,) = source.manager.load([spec])["tasks"].values()
    return task


def _beside(value: Any, folder: Path) -> Any:
    """Prefix file names, nested in lists or dicts, with `folder` if they exist there."""
    if isinstance(value, dict):
        return {key: _beside(each, folder) for key, each in value.items()}
    if isinstance(value, list):
        return [_beside(each, folder) for each in value]
    return str(folder / value) if isinstance(value, str) and (folder / value).exists() else value


def _check(source: _Source, task: Any, limit: int | None) -> None:
    """Raise DataError for a task that is not scored by likelihood, or an item whose answer is not among its choices."""
    name = source.harness_name
    if task.OUTPUT_TYPE not in ANSWERED_BY_LIKELIHOOD or "acc" not in task.aggregation():
        raise DataError(
            f"the task {name!r} has no accuracy by likelihood: its output_type must be "
            f"{' or '.join(ANSWERED_BY_LIKELIHOOD)}, and `acc` among its metrics"
        )
    task.build_all_requests(limit=limit)
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for i, item in task.doc_iterator(limit=limit):
        right = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
        choices = task.doc_to_choice(item)
        known = choices if isinstance(right, str) else range(len(choices))
        if not isinstance(right, list) and right not in known:
            raise DataError(
                f"the task {name!r} gives {right!r} as the answer of item {i}, which has {len(choices)} choices"
            )


def _cannot_load(source: _Source, offline: bool, error: Exception) -> str:
    if source.local:
        return f"the task {source.harness_name!r} of {source.file} cannot be loaded ({reason(error)})"
    if offline:
        advice = "give --tasks-dir, a folder with tasks of local files (docs/guides/evaluate.md)"
        if source.beside:
            advice = f"the folder of --tasks-dir has no such task, but {', '.join(source.beside)}"
        return (
            f"the data of the task {source.harness_name!r} are not on this machine and the hub cannot be reached; "
            f"{advice}"
        )
    return f"the task {source.harness_name!r} cannot be loaded ({reason(error)})"
