"""A runner for benchmarks/paper that answers with given figures and records its calls."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.runner import Failure

Say = Callable[[Sequence[str]], dict[str, Any] | Failure | None]


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value after `flag`; None without the flag."""
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def setting_of(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of the last `--set name=…`."""
    found = [each.partition("=")[2] for each in arguments if each.startswith(f"{name}=")]
    return found[-1] if found else None


def parameters(before: int = 1000) -> dict[str, int]:
    return {"decoder_before": before, "decoder_after": before // 2, "total_before": before, "total_after": before // 2}


def evaluation(perplexity: float, report: float | None = None) -> dict[str, Any]:
    return {"perplexity": perplexity, "report_perplexity": report, "parameters": parameters()}


def search(perplexity: float, report: float | None = None, *, finished: bool = True) -> dict[str, Any]:
    return {"finished": finished, "best": evaluation(perplexity, report), "seconds": 12.5}


def zero_shot(mean: float) -> dict[str, Any]:
    return {"mean": mean, "tasks": [{"task": "boolq", "accuracy": mean}, {"task": "piqa", "accuracy": mean}]}


def speed(tokens_per_second: float, *engines: str) -> dict[str, Any]:
    def engine(name: str) -> dict[str, Any]:
        dense = {"total_parameters": 6_740_000_000, "weight_bytes": 13_480_000_000, "weight_type": "bfloat16"}
        pruned = {"total_parameters": 4_770_000_000, "weight_bytes": 9_540_000_000, "weight_type": "bfloat16"}
        decode = {
            "dense": {"median": 50.0},
            "pruned": {"median": tokens_per_second},
            "speed_up": {"median": tokens_per_second / 50},
        }
        sizes = {"dense": dense, "pruned": pruned}
        return {"engine": name, "device": "cpu", **sizes, "batches": [{"batch_size": 1, "decode": decode}]}

    return {"engines": [engine(name) for name in engines or ("transformers",)], "skipped": {"vllm": "not installed"}}


def usual(arguments: Sequence[str]) -> dict[str, Any]:
    """Return an answer of each command: dense measures 10, each method another figure."""
    command = arguments[0]
    if command == "evaluate":
        by_method = {None: 10.0, "llm-pruner": 14.0, "uniform": 13.0, "owl": 12.0}
        return evaluation(1.0, by_method[value_of(arguments, "--allocate")])
    answers = {
        "run": search(1.0, 11.0),
        "zero-shot": zero_shot(0.5),
        "export": {"parameters": parameters()},
        "finetune": {"folder": "x"},
        "speed": speed(100.0),
    }
    return answers[command]


def write_made(arguments: Sequence[str]) -> None:
    """Create the file by which later commands find this one's output."""
    if arguments[0] == "run":
        folder, name = (setting_of(arguments, setting) or "" for setting in ("run.folder", "search.name"))
        file = Path(folder) / name / "best.json"
    elif arguments[0] in ("export", "finetune"):
        file = Path(value_of(arguments, "--out") or "") / "selfpruner.json"
    else:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")


def says_to(command: str, answer: dict[str, Any] | Failure) -> Say:
    """Give this answer to a command, and the usual ones to all others."""
    return lambda arguments: answer if arguments[0] == command else None


class ScriptedRunner:
    """Answers with `say`, or with the default answer if that returns None. Successful commands create their files."""

    def __init__(self, say: Say = lambda arguments: None) -> None:
        self.asked: list[list[str]] = []
        self._say = say

    def run(self, arguments: Sequence[str], log: Path) -> dict[str, Any] | Failure:
        self.asked.append(list(arguments))
        answer = self._say(arguments)
        if not isinstance(answer, Failure):
            write_made(arguments)
        return usual(arguments) if answer is None else answer

    def commands(self) -> list[str]:
        return [arguments[0] for arguments in self.asked]
