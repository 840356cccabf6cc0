"""The paper's seven zero-shot tasks, and the accuracy metric that its tables use for each. Pure.

lm-eval computes two accuracies for a multiple-choice task: `acc` takes the answer with the highest log-likelihood,
`acc_norm` first divides by the answer's length in characters. The paper (Tables 8 to 11) does not say which one it
reports. Comparing its dense rows with published runs of lm-eval (in percent) shows it:

==============  ============  =================  ============  =================
task            LLaMA-7B      lm-eval            LLaMA-2-7B    lm-eval
                in the paper  acc / acc_norm     in the paper  acc / acc_norm
==============  ============  =================  ============  =================
HellaSwag       76.19         56.9 / **76.2**    75.97         57.1 / **76.0**
WinoGrande      69.85         **69.9**           69.06         **69.1**
BoolQ           75.11         **75.1**           77.74         **77.7**
OpenBookQA      44.40         34.4 / **44.4**    44.20         31.4 / **44.2**
PIQA            78.62         **78.7** / 79.2    78.07         **78.1** / 79.1
ARC-e           75.25         **75.3** / 72.9    76.35         **76.3** / 74.7
ARC-c           44.71         41.8 / **44.7**    46.33         43.5 / **46.2**
==============  ============  =================  ============  =================

So HellaSwag, OpenBookQA and ARC-c use `acc_norm`, PIQA and ARC-e use `acc`, and WinoGrande and BoolQ only have `acc`.
The paper's mean is unweighted: the LLaMA-7B values above have the paper's mean of 66.30.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from protocol.errors import SettingsError

Metric = Literal["acc", "acc_norm"]
"""How an answer is chosen: by log-likelihood, or by log-likelihood per character."""


@dataclass(frozen=True)
class ZeroShotTask:
    """One of the paper's tasks."""

    name: str
    """The name on the command line."""
    title: str
    """The name in the paper."""
    harness_name: str
    """The name in lm-eval."""
    metric: Metric
    """The accuracy in the paper's tables."""


PAPER_TASKS: tuple[ZeroShotTask, ...] = (
    ZeroShotTask("hellaswag", "HellaSwag", "hellaswag", "acc_norm"),
    ZeroShotTask("winogrande", "WinoGrande", "winogrande", "acc"),
    ZeroShotTask("boolq", "BoolQ", "boolq", "acc"),
    ZeroShotTask("openbookqa", "OpenBookQA", "openbookqa", "acc_norm"),
    ZeroShotTask("piqa", "PIQA", "piqa", "acc"),
    ZeroShotTask("arc-e", "ARC-e", "arc_easy", "acc"),
    ZeroShotTask("arc-c", "ARC-c", "arc_challenge", "acc_norm"),
)
"""The paper's tasks, in the order of its columns."""

_ALIASES = {"obqa": "openbookqa", "arceasy": "arce", "arcchallenge": "arcc"}


def paper_task(name: str) -> ZeroShotTask | None:
    """Return the paper's task with this name, in our, the paper's or lm-eval's spelling; None for any other task."""
    plain = re.sub(r"[-_ ]", "", name.lower())
    plain = _ALIASES.get(plain, plain)
    return next((task for task in PAPER_TASKS if task.name.replace("-", "") == plain), None)


def split_task_names(given: Iterable[str]) -> tuple[str, ...]:
    """Split comma-separated task names; each name is returned once, in order of appearance."""
    names = [name.strip() for each in given for name in each.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def select_tasks(names: Iterable[str]) -> tuple[ZeroShotTask, ...]:
    """Return the named tasks of the paper, or all without names. Raises SettingsError for an unknown name."""
    chosen: dict[str, ZeroShotTask] = {}
    for name in names:
        task = paper_task(name)
        if task is None:
            raise SettingsError(unknown_task(name, (task.name for task in PAPER_TASKS)))
        chosen[task.name] = task
    return tuple(chosen.values()) or PAPER_TASKS


def unknown_task(name: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown task."""
    return f"there is no task {name!r}; the tasks are {', '.join(known)}"


def counted_metric(harness_name: str) -> Metric:
    """Return the reported accuracy of a task: the paper's for its seven tasks, else `acc`, which every task has."""
    task = paper_task(harness_name)
    return "acc" if task is None else task.metric
