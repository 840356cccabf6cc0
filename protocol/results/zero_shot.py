"""The paper's seven zero-shot tasks, and which accuracy of each its tables hold. Pure.

lm-eval knows two accuracies of a task with several answers: `acc` takes the answer of the highest log-likelihood,
`acc_norm` divides each by the answer's length in characters first. The paper (Tables 8 to 11) does not say which it
shows. Its dense rows do, beside runs of lm-eval that others have published, in percent:

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

So HellaSwag, OpenBookQA and ARC-c are `acc_norm`, PIQA and ARC-e `acc`; WinoGrande and BoolQ have no other. The paper's
mean is the plain one over the seven: that of LLaMA-7B's row above is its 66.30.
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
    """One of the seven."""

    name: str
    """As on the command line."""
    title: str
    """As in the paper."""
    harness_name: str
    """As lm-eval calls it."""
    metric: Metric
    """What the paper's tables hold."""


PAPER_TASKS: tuple[ZeroShotTask, ...] = (
    ZeroShotTask("hellaswag", "HellaSwag", "hellaswag", "acc_norm"),
    ZeroShotTask("winogrande", "WinoGrande", "winogrande", "acc"),
    ZeroShotTask("boolq", "BoolQ", "boolq", "acc"),
    ZeroShotTask("openbookqa", "OpenBookQA", "openbookqa", "acc_norm"),
    ZeroShotTask("piqa", "PIQA", "piqa", "acc"),
    ZeroShotTask("arc-e", "ARC-e", "arc_easy", "acc"),
    ZeroShotTask("arc-c", "ARC-c", "arc_challenge", "acc_norm"),
)
"""In the order of the paper's columns."""

_ALIASES = {"obqa": "openbookqa", "arceasy": "arce", "arcchallenge": "arcc"}


def paper_task(name: str) -> ZeroShotTask | None:
    """The one of the seven that is called so, by us, by the paper or by lm-eval; None for any other task."""
    plain = re.sub(r"[-_ ]", "", name.lower())
    plain = _ALIASES.get(plain, plain)
    return next((task for task in PAPER_TASKS if task.name.replace("-", "") == plain), None)


def names_in(given: Iterable[str]) -> tuple[str, ...]:
    """The names of tasks that were given, apart or with commas between them; each once, in order of appearance."""
    names = [name.strip() for each in given for name in each.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def chosen_tasks(names: Iterable[str]) -> tuple[ZeroShotTask, ...]:
    """Those of the seven that are named; all where none is. Raises SettingsError for a name that is none of them."""
    chosen: dict[str, ZeroShotTask] = {}
    for name in names:
        task = paper_task(name)
        if task is None:
            raise SettingsError(unknown_task(name, (task.name for task in PAPER_TASKS)))
        chosen[task.name] = task
    return tuple(chosen.values()) or PAPER_TASKS


def unknown_task(name: str, known: Iterable[str]) -> str:
    """The sentence about a task that nobody knows."""
    return f"there is no task {name!r}; the tasks are {', '.join(known)}"


def counted_metric(harness_name: str) -> Metric:
    """Which accuracy of a task counts: the paper's where it is one of the seven, else `acc`, which all have."""
    task = paper_task(harness_name)
    return "acc" if task is None else task.metric
