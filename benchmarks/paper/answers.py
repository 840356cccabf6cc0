"""Parses the JSON that `selfpruner … --json` prints; the only file that knows its keys."""

from dataclasses import dataclass, field
from typing import Any, Literal

CellCommand = Literal["evaluate", "run", "export", "zero-shot", "finetune", "speed"]
"""The command of a cell."""
ENGINES = ("vllm", "transformers", "llama.cpp")
"""Table 7 shows the first of these engines that has a measurement; the paper's engine comes first."""
GIB = 2**30


class UnreadableAnswer(Exception):  # noqa: N818  (an answer is unreadable; nothing broke)
    """An answer without the values that the tables need; the message is one sentence."""


@dataclass(frozen=True)
class Speed:
    """Table 7's figures of one model."""

    parameters: float
    """Number of parameters in billions."""
    memory: float
    """Memory of the weights, in GiB, as in the paper."""
    tokens_per_second: float
    """Generated tokens per second."""
    speed_up: float
    how: str
    """Engine, device and weight type."""


@dataclass(frozen=True)
class Figures:
    """The figures of a finished cell. Figures that its command does not measure are None."""

    perplexity: float | None = None
    """On the report text if there is one, else on the fitness text."""
    accuracy: float | None = None
    """Mean over the tasks, in percent."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Accuracy by task, in percent."""
    total_parameters: int | None = None
    """Parameters of the dense model."""
    speed: Speed | None = None
    dense_speed: Speed | None = None


def read(what: CellCommand, answer: dict[str, Any]) -> Figures:
    """Return the figures of an answer. Raises UnreadableAnswer."""
    try:
        return _READ_BY[what](answer)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise UnreadableAnswer(f"the answer of `selfpruner {what}` cannot be read: {error!r}") from error


def _evaluation(answer: dict[str, Any]) -> Figures:
    return Figures(perplexity=_reported(answer), total_parameters=int(answer["parameters"]["total_before"]))


def _search(answer: dict[str, Any]) -> Figures:
    if not answer["finished"]:
        raise UnreadableAnswer("the search was stopped before its end")
    return _evaluation(answer["best"])


def _written(answer: dict[str, Any]) -> Figures:
    parameters = answer.get("parameters") or {}
    return Figures(total_parameters=parameters.get("total_before"))


def _zero_shot(answer: dict[str, Any]) -> Figures:
    tasks = {task["task"]: 100 * float(task["accuracy"]) for task in answer["tasks"]}
    return Figures(accuracy=100 * float(answer["mean"]), tasks=tasks)


def _speed(answer: dict[str, Any]) -> Figures:
    measured = {engine["engine"]: engine for engine in answer["engines"]}
    names = [name for name in ENGINES if name in measured]
    if not names:
        reasons = "; ".join(f"{name}: {why}" for name, why in answer.get("skipped", {}).items())
        raise UnreadableAnswer(f"no engine measured its speed ({reasons})")
    engine = measured[names[0]]
    decode = engine["batches"][0]["decode"]
    pruned, dense = (
        Speed(
            parameters=engine[which]["total_parameters"] / 1e9,
            memory=engine[which]["weight_bytes"] / GIB,
            tokens_per_second=float(decode[which]["median"]),
            speed_up=float(decode["speed_up"]["median"]) if which == "pruned" else 1.0,
            how=f"{engine['engine']} on {engine['device']}, weights {engine[which]['weight_type']}",
        )
        for which in ("pruned", "dense")
    )
    return Figures(speed=pruned, dense_speed=dense, total_parameters=engine["dense"]["total_parameters"])


def _reported(row: dict[str, Any]) -> float:
    report = row.get("report_perplexity")
    return float(row["perplexity"] if report is None else report)


_READ_BY = {
    "evaluate": _evaluation,
    "run": _search,
    "export": _written,
    "finetune": _written,
    "zero-shot": _zero_shot,
    "speed": _speed,
}
