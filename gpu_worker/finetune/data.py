"""Reads training data: instructions in Alpaca's format, or plain text cut into windows."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from gpu_worker.measuring.corpora import HubData, load_roles
from gpu_worker.models.loading import LoadedModel
from protocol.errors import DataError
from protocol.plans.spec import TextSpec
from protocol.results.finetuning import ALPACA_GPT4, HUB_EXAMPLES, Form, Recipe, form_of

ALPACA_ON_THE_HUB = "vicgalle/alpaca-gpt4"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""Alpaca's prompts, which LLM-Pruner uses too."""
FORM = "object with the strings instruction and output and, optionally, input"


class Instruction(BaseModel):
    """One example in Alpaca's format; other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    instruction: str
    output: str
    input: str | None = ""

    @property
    def prompt(self) -> str:
        """Return the prompt, which the model does not learn to predict."""
        words = WITH_INPUT if self.input else WITHOUT_INPUT
        return words.format(instruction=self.instruction, input=self.input)


@dataclass(frozen=True)
class Example:
    """Tokens (long, [length]); those from index `first` on are predicted."""

    tokens: Tensor
    first: int

    @property
    def predicted(self) -> int:
        """Return the number of predicted tokens."""
        return len(self.tokens) - self.first


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


def read_instructions(source: str, recipe: Recipe) -> tuple[Instruction, ...] | None:
    """Read the number of instructions that `recipe` asks for, from the hub or a file. Returns None for a plain text.

    Raises DataError if they are not available, and for the first invalid line or entry.
    """
    if form_of(source) == "text":
        return None
    found = _of_the_hub() if source == ALPACA_GPT4 else _of_a_file(Path(source).expanduser())
    wanted = recipe.examples or (HUB_EXAMPLES if source == ALPACA_GPT4 else None)
    return found if wanted is None else tuple(found[i] for i in _picked(len(found), wanted, recipe.seed))


def prepare_data(
    source: str, instructions: tuple[Instruction, ...] | None, model: LoadedModel, recipe: Recipe
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
        cut = (_example(each, model, recipe.seqlen) for each in instructions)
        examples = tuple(example for example in cut if example.predicted > 0)
    if not examples:
        raise DataError(
            f"nothing of {source!r} is left to learn: every answer starts after {recipe.seqlen} tokens; increase seqlen"
        )
    return TrainingData(source if source == ALPACA_GPT4 else Path(source).name, form_of(source), examples)


def _no_text_of_its_own(_windows: int, _length: int) -> Tensor:
    raise AssertionError("`self` is refused earlier")


def _example(instruction: Instruction, model: LoadedModel, seqlen: int) -> Example:
    """Tokenize prompt and answer separately, to know where the answer starts, and append the end-of-text token."""
    tokenizer = model.tokenizer
    prompt = tokenizer(instruction.prompt, verbose=False)["input_ids"]
    answer = tokenizer(instruction.output, verbose=False, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Some tokenizers append an end-of-text token to every text.
    prompt = prompt[:-1] if end and prompt[-1:] == end else prompt
    start = model.window_start
    if start is not None and prompt[:1] != [start]:
        prompt = [start, *prompt]
    return Example(torch.tensor([*prompt, *answer, *end][:seqlen], dtype=torch.long), len(prompt))


def _picked(there: int, wanted: int, seed: int) -> list[int]:
    """Return at most `wanted` random indices below `there`, sorted."""
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))
    picked: list[int] = order[:wanted].sort().values.tolist()
    return picked


def _of_the_hub() -> tuple[Instruction, ...]:
    otherwise = "pass a file with --data: JSON or JSONL in Alpaca's format, or a text"
    rows = HubData(ALPACA_ON_THE_HUB, None, ALPACA_GPT4, otherwise).split("train")
    return tuple(_instruction(row, f"row {i} of {ALPACA_ON_THE_HUB}") for i, row in enumerate(rows, start=1))


def _of_a_file(path: Path) -> tuple[Instruction, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"the data {str(path)!r} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the data {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    entries = _lines(text, path) if path.suffix.lower() == ".jsonl" else _entries(text, path)
    found = tuple(_instruction(entry, place) for place, entry in entries)
    if not found:
        raise DataError(f"the data {str(path)!r} holds no instructions")
    return found


def _lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    # Not `splitlines`, which also splits at characters that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"line {number} of {path}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is not valid JSON ({_json_reason(error)})") from error


def _entries(text: str, path: Path) -> Iterable[tuple[str, Any]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(
            f"line {line} of {path} is not valid JSON ({_json_reason(error)}); with one object per line, name it .jsonl"
        ) from error
    if not isinstance(content, list):
        raise DataError(f"{path} is not a JSON list in which each example is an {FORM}")
    return ((f"entry {number} of {path}", entry) for number, entry in enumerate(content, start=1))


def _json_reason(error: Exception) -> str:
    return getattr(error, "msg", None) or str(error)


def _instruction(entry: Any, place: str) -> Instruction:
    if not isinstance(entry, dict):
        raise DataError(f"{place} is not an {FORM}")
    try:
        return Instruction.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        field = first["loc"][0]
        wrong = f"has no {field!r}" if first["type"] == "missing" else f"has an {field!r} that is not a string"
        raise DataError(f"{place} {wrong}: it must be an {FORM}") from error
