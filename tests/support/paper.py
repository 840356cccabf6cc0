"""Calls of benchmarks.paper with a scripted `selfpruner`, and their output."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paper.__main__ import main
from benchmarks.paper.runner import Runner
from tests.support.scripted_runner import Say, ScriptedRunner, usual

LLAMA = "meta-llama/Llama-2-7b-hf"
SMALL = {"models": ["tiny"], "rates": [0.3], "methods": ["dense", "wanda-sp", "self-pruner"]}
ALL = {"models": [LLAMA], "tables": [1, 2, 3, 4, 5, 6, 7], "zero_shot": {}}
ONE_TEXT = {"calibration_windows": 4, "fitness_windows": 2, "report_windows": 2, "seqlen": 64}


class Paper:
    """Calls in one folder, and the tables that they write."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"

    def make(
        self, settings: dict[str, Any], say: Say = usual, *, flags: Sequence[str] = (), code: int = 0
    ) -> ScriptedRunner:
        """Make the tables with `say`, expect the exit code `code` and return what was run."""
        runner = ScriptedRunner(say)
        assert self.run(settings, runner, *flags) == code
        return runner

    def run(self, settings: dict[str, Any], runner: Runner, *flags: str) -> int:
        file = self.folder / "tables.yaml"
        file.write_text(yaml.safe_dump({"texts": ONE_TEXT, **settings}))
        return main([str(file), "--out", str(self.out), *flags], runner)

    @property
    def markdown(self) -> str:
        return (self.out / "tables.md").read_text()

    def table(self, number: int) -> dict[tuple[str, ...], list[tuple[float | None, float | None]]]:
        """The rows of a written table: labels -> (ours, the paper's) of each column."""
        tables = json.loads((self.out / "tables.json").read_text())["tables"]
        (found,) = (each for each in tables if each["table"] == number)
        return {tuple(row["labels"]): [(e["ours"], e["paper"]) for e in row["entries"]] for row in found["rows"]}
