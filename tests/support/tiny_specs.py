"""Specs of a tiny model and a short text, for tests of the worker's parts together."""

import random
from pathlib import Path
from typing import Any

from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.tiny_models import save_tiny_folder


def write_text(path: Path, words: int = 800, seed: int = 0) -> str:
    """Write this many invented words to `path` and return it as a source."""
    dice = random.Random(seed)
    path.write_text(" ".join("".join(dice.choices("abcdefgh", k=4)) for _ in range(words)))
    return str(path)


def tiny_spec(folder: Path, **options: Any) -> SearchSpec:
    """A spec with a model and a text written to `folder`: four windows to score on, two to search on, two to report.

    `options` are those of the model.
    """
    text = write_text(folder / "text.txt")
    return SearchSpec(
        model=str(save_tiny_folder(folder / "model", hidden_size=48, **options)),
        rate=0.4,
        calibration=TextSpec(source=text, windows=4, seqlen=32),
        fitness=TextSpec(source=text, windows=2, seqlen=64),
        report=TextSpec(source=text, windows=2, seqlen=32),
        dtype="float32",
    )


def tiny_search(
    name: str, model: Path, text: Path, endpoints: list[dict[str, str]], *, rate: float = 0.3, rounds: int = 3
) -> dict[str, dict[str, Any]]:
    """The settings of a search of 6 + 5 * `rounds` candidates, for a file of JSON, which is YAML."""
    windows = {"calibration_windows": 4, "fitness_windows": 2, "seqlen": 32}
    return {
        "search": {"name": name, "population": 6, "mutations": 3, "crossovers": 2, "rounds": rounds},
        "target": {"model": str(model), "rate": rate, "dtype": "float32"},
        "data": {"calibration": str(text), "fitness": str(text), **windows},
        "llm": {"reply": "edits", "endpoints": endpoints},
    }
