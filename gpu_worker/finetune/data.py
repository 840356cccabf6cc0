"""Reads training data: prompts with answers, or plain text cut into windows."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.measuring.corpora import HubData, load_roles
from gpu_worker.measuring.examples import Example, TaskExample, parse_example, read_examples, tokenized
from gpu_worker.models.loading import LoadedModel
from protocol.errors import DataError
from protocol.plans.spec import TextSpec
from protocol.results.finetuning import ALPACA_GPT4, HUB_EXAMPLES, Form, Recipe, form_of

ALPACA_ON_THE_HUB = "vicgalle/alpaca-gpt4"


@dataclass(frozen=True)
class TrainingData:
    """All examples in data order."""

    name: str
    form: Form
    examples: tuple[Example, ...]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of all tokens and of the indices of the first predicted tokens."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(f"{len(example.tokens)}|{example.first}|".encode())
            digest.update(example.tokens.numpy().tobytes())
        return digest.hexdigest()


def read_instructions(source: str, recipe: Recipe) -> tuple[TaskExample, ...] | None:
    """Read the number of examples that `recipe` asks for, from the hub or a file. Returns None for a plain text.

    Raises DataError if they are not available, and for the first invalid line or entry.
    """
    if form_of(source) == "text":
        return None
    found = _of_the_hub() if source == ALPACA_GPT4 else read_examples(Path(source).expanduser())
    wanted = recipe.examples or (HUB_EXAMPLES if source == ALPACA_GPT4 else None)
    return found if wanted is None else tuple(found[i] for i in _picked(len(found), wanted, recipe.seed))


def prepare_data(
    source: str, instructions: tuple[TaskExample, ...] | None, model: LoadedModel, recipe: Recipe
) -> TrainingData:
    """Tokenize `instructions` for `model`; if they are None, tokenize the text `source`.

    Raises DataError for a text that is not available, and if no tokens remain to be predicted.
    """
    if instructions is None:
        windows = load_roles(
            {"calibration": TextSpec(source=source, windows=None, seqlen=recipe.seqlen)},  # the train split
            recipe.seed,
            model.tokenizer,
            _no_text_of_its_own,
            model.window_start,
        )["calibration"]
        if recipe.examples is not None:
            windows = windows[_picked(len(windows), recipe.examples, recipe.seed)]
        examples = tuple(Example(window, 1) for window in windows)
    else:
        examples = tuple(tokenized(instructions, model.tokenizer, model.window_start, recipe.seqlen))
    if not examples:
        raise DataError(
            f"nothing of {source!r} is left to learn: every answer starts after {recipe.seqlen} tokens; increase seqlen"
        )
    return TrainingData(source if source == ALPACA_GPT4 else Path(source).name, form_of(source), examples)


def _no_text_of_its_own(_windows: int, _length: int) -> Tensor:
    raise AssertionError("`self` is refused earlier")


def _picked(there: int, wanted: int, seed: int) -> list[int]:
    """Return at most `wanted` random indices below `there`, sorted."""
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))
    picked: list[int] = order[:wanted].sort().values.tolist()
    return picked


def _of_the_hub() -> tuple[TaskExample, ...]:
    otherwise = "pass a file with --data: JSON or JSONL in Alpaca's format, or a text"
    rows = HubData(ALPACA_ON_THE_HUB, None, ALPACA_GPT4, otherwise).split("train")
    return tuple(parse_example(row, f"row {i} of {ALPACA_ON_THE_HUB}") for i, row in enumerate(rows, start=1))
