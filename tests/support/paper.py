"""Calls of benchmarks.paper, mostly with a scripted `selfpruner`, and their output."""

import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paper.__main__ import main
from benchmarks.paper.runner import Runner

LLAMA = "meta-llama/Llama-2-7b-hf"


SMALL = {"models": ["tiny"], "rates": [0.3], "methods": ["dense", "wanda-sp", "self-pruner"]}


ALL = {"models": [LLAMA], "tables": [1, 2, 3, 4, 5, 6, 7], "zero_shot": {}}


ONE_TEXT = {"calibration_windows": 4, "fitness_windows": 2, "report_windows": 2, "seqlen": 64}


def write(folder: Path, settings: dict[str, Any]) -> Path:
    file = folder / "tables.yaml"
    file.write_text(yaml.safe_dump({"texts": ONE_TEXT, **settings}))
    return file


def make(folder: Path, settings: dict[str, Any], runner: Runner, *flags: str) -> int:
    return main([str(write(folder, settings)), "--out", str(folder / "out"), *flags], runner)


def markdown(folder: Path) -> str:
    return (folder / "out" / "tables.md").read_text()


def table(folder: Path, number: int) -> dict[tuple[str, ...], list[tuple[float | None, float | None]]]:
    """The rows of a written table: labels -> (ours, the paper's) of each column."""
    tables = json.loads((folder / "out" / "tables.json").read_text())["tables"]
    (found,) = (each for each in tables if each["table"] == number)
    return {tuple(row["labels"]): [(e["ours"], e["paper"]) for e in row["entries"]] for row in found["rows"]}
