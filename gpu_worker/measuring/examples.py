"""Examples of a task: prompts with answers, of which only the answers are predicted.

A file holds a list of JSON objects (`.json`) or one object per line (`.jsonl`). Each has `prompt` and `completion`;
`messages` of a chat, the last of them the assistant's; or Alpaca's `instruction`, `input` and `output`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from protocol.errors import DataError

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


class _Form(BaseModel):
    """One form of an example; other fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Instruction(_Form):
    """An example in Alpaca's form."""

    instruction: str
    output: str
    input: str | None = ""

    def parts(self) -> tuple[str, str]:
        """Return the prompt and the answer."""
        words = WITH_INPUT if self.input else WITHOUT_INPUT
        return words.format(instruction=self.instruction, input=self.input), self.output


class Completion(_Form):
    """A text with the completion that is wanted."""

    prompt: str
    completion: str

    def parts(self) -> tuple[str, str]:
        """Return the prompt and the answer."""
        return self.prompt, self.completion


class Message(_Form):
    """A message of a chat."""

    role: str
    content: str


class Chat(_Form):
    """Messages of a chat, the last of which is the answer."""

    messages: list[Message]


log = structlog.get_logger()

TaskExample = Instruction | Completion | Chat
FORMS: dict[str, tuple[type[Instruction] | type[Completion] | type[Chat], str]] = {
    "messages": (Chat, "object with the list messages, each with the strings role and content"),
    "prompt": (Completion, "object with the strings prompt and completion"),
    "instruction": (Instruction, "object with the strings instruction and output and, optionally, input"),
}
"""The form of an object that has this field, and what it must be."""


@dataclass(frozen=True)
class Example:
    """Tokens (long, [length]); those from index `first` on are predicted."""

    tokens: Tensor
    first: int

    @property
    def predicted(self) -> int:
        """Return the number of predicted tokens."""
        return len(self.tokens) - self.first


def read_examples(path: Path) -> tuple[TaskExample, ...]:
    """Read all examples of a file. Raises DataError for a file without examples, and for the first invalid one."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"the data {str(path)!r} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the data {str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    entries = _lines(text, path) if path.suffix.lower() == ".jsonl" else _entries(text, path)
    found = tuple(parse_example(entry, place) for place, entry in entries)
    if not found:
        raise DataError(f"the data {str(path)!r} holds no examples")
    return found


def parse_example(entry: Any, place: str) -> TaskExample:
    """Return the example of a JSON object, called `place` in messages. Raises DataError."""
    form, wanted = FORMS["instruction"]
    if isinstance(entry, dict):
        form, wanted = next((FORMS[field] for field in FORMS if field in entry), FORMS["prompt"])
    try:
        if not isinstance(entry, dict):
            raise DataError(f"{place} is not an object")
        example = form.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        wrong = f"has no {field!r}" if first["type"] == "missing" else f"has an invalid {field!r}"
        raise DataError(f"{place} {wrong}: it must be an {wanted}") from error
    if isinstance(example, Chat) and (not example.messages or example.messages[-1].role != "assistant"):
        raise DataError(f"{place} does not end with a message of the role assistant, which is the answer")
    texts = [each.content for each in example.messages] if isinstance(example, Chat) else example.parts()
    if not texts[-1]:
        raise DataError(f"{place} has an empty answer")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} is not text in UTF-8: it has half of a surrogate pair") from error
    return example


def tokenized(examples: Sequence[TaskExample], tokenizer: Any, start: int | None, seqlen: int) -> list[Example]:
    """Return the tokens of examples, at most `seqlen` of each; those without a token to predict are left out.

    Prompt and answer are tokenized separately, to know where the answer starts, and the end-of-text token is appended.
    `start` is the token that every text must begin with, if any. Raises DataError for a chat without a chat template.
    """
    parts = [_chat_parts(each, tokenizer) if isinstance(each, Chat) else each.parts() for each in examples]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    is_chat = [isinstance(each, Chat) for each in examples]
    # A chat template writes the special tokens itself.
    plain = _ids([asked for (asked, _), chat in zip(parts, is_chat, strict=True) if not chat], tokenizer, special=True)
    chats = _ids([asked for (asked, _), chat in zip(parts, is_chat, strict=True) if chat], tokenizer, special=False)
    answers = _ids([told for _, told in parts], tokenizer, special=False)
    found, cut = [], 0
    for chat, answer in zip(is_chat, answers, strict=True):
        prompt = next(chats if chat else plain)
        if not chat:
            # Some tokenizers append an end-of-text token to every text.
            prompt = prompt[:-1] if end and prompt[-1:] == end else prompt
            answer = [*answer, *end]  # noqa: PLW2901
        if start is not None and prompt[:1] != [start]:
            prompt = [start, *prompt]
        cut += len(prompt) < seqlen < len(prompt) + len(answer)
        found.append(Example(torch.tensor([*prompt, *answer][:seqlen], dtype=torch.long), max(len(prompt), 1)))
    kept = [example for example in found if example.predicted > 0]
    if len(kept) < len(found) or cut:
        log.warning("examples_cut", left_out=len(found) - len(kept), cut=cut, of=len(found), seqlen=seqlen)
    return kept


def _ids(texts: list[str], tokenizer: Any, *, special: bool) -> Iterator[list[int]]:
    """Yield the tokens of each text, with the special tokens that the tokenizer adds, or without."""
    yield from tokenizer(texts, verbose=False, add_special_tokens=special)["input_ids"] if texts else ()


def _chat_parts(example: Chat, tokenizer: Any) -> tuple[str, str]:
    """Return the prompt and the answer as the model's chat template writes them."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError("the model has no chat template: give examples with prompt and completion, not messages")
    messages = [message.model_dump() for message in example.messages]
    try:
        asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise errors of their own for roles that they do not know
        raise DataError(f"the model's chat template refuses the messages: {error}") from error
    if not whole.startswith(asked):
        raise DataError("with the answer, the model's chat template changes the prompt: give prompt and completion")
    return asked, whole[len(asked) :]


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
        raise DataError(f"{path} is not a JSON list of objects")
    return ((f"entry {number} of {path}", entry) for number, entry in enumerate(content, start=1))


def _json_reason(error: Exception) -> str:
    return getattr(error, "msg", None) or str(error)
