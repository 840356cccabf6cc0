"""Response bodies of endpoints -> values: chat completions and lists of models. Pure.

Endpoints answer 200 with error objects, login pages, null choices and half-finished reasoning; each case is detected
here. Numbers inside a model's reasoning are never read as its answer. Reading takes linear time, and implausible
numbers are bounded.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from protocol.errors import EndpointError

MAX_PARTS = 50_000
"""Maximum number of lists and objects in one body; a list of 400 models has 5,000. Each of them is three bytes long but
takes many times more memory, and the garbage collector visits all of them again and again."""
LONGEST_REPLY = 400_000
"""Maximum number of characters of an answer that are read; thirty lists of 160 rates have 50,000."""
CHARACTERS_PER_TOKEN = 4
"""Estimate for endpoints that do not count tokens, so that the budget still holds."""
MAX_TOKENS_PER_CHARACTER = 2
"""Largest plausible number of prompt tokens per character. A tokenizer that falls back to bytes makes up to four
tokens of a rare character, but our prompts are ASCII."""
TEMPLATE_TOKENS = 2_000
"""Prompt tokens allowed in addition, for a chat template and a provider's own instructions."""
LONGEST_NAME = 1_000
"""Maximum number of characters of a model's name; models with longer names are skipped."""
LARGEST_CONTEXT = 10**9
"""Largest plausible context size in tokens; larger sizes are ignored."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_FINISHES = ("stop", "length", "content_filter", "tool_calls", "function_call")
_TAG = "(think|thinking|reasoning)"
_FLAGS = re.DOTALL | re.IGNORECASE | re.ASCII
_OPENING = re.compile(f"<{_TAG}>", _FLAGS)
_CLOSINGS = {kind: re.compile(f"</{kind}>", _FLAGS) for kind in ("think", "thinking", "reasoning")}
_CLOSE_ONLY = re.compile(rf"\A.*</{_TAG}>", _FLAGS)
_CONTEXTS = ("max_model_len", "context_length", "context_window", "n_ctx")
"""Names of the context size in the model lists of vLLM, of routers and of llama.cpp (under `meta`)."""
_TRAINED_CONTEXT = "n_ctx_train"
"""llama.cpp's name of the context size in training; the model may be served with a larger or smaller size."""


@dataclass(frozen=True)
class Completion:
    """The contents of one completion. `text` is empty if the model refused or spent all tokens on reasoning."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def check_content_type(content_type: str) -> None:
    """Raise EndpointError unless the type is JSON. A login page or a proxy's error page may also have status 200."""
    if "json" not in content_type.lower():
        raise EndpointError(
            f"the endpoint answered {content_type or 'no content type'} instead of JSON", retryable=True
        )


def read_json(body: bytes) -> object:
    """Return the value of `body`. Raise ValueError if it is not JSON, is nested too deep, or has too many parts."""
    if _brackets(body) > MAX_PARTS and _brackets(_STRING.sub(b"", body)) > MAX_PARTS:
        raise ValueError("too many lists and objects")
    try:
        value: object = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def _brackets(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def read_completion(body: bytes, *, asked: int, max_tokens: int) -> Completion:
    """Return the first choice's text without its reasoning, and the token counts.

    `asked` is the number of characters that were sent, `max_tokens` the token limit that was sent. Both bound the
    token counts. Raise EndpointError (retryable) for anything that is not a chat completion: truncated JSON, an error
    object, no choices.
    """
    try:
        reply = read_json(body)
    except ValueError:
        raise EndpointError(f"the endpoint's reply of {len(body)} bytes is not whole JSON", retryable=True) from None
    if not isinstance(reply, dict):
        raise EndpointError("the endpoint's reply is not a JSON object", retryable=True)
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise EndpointError(f"the endpoint answered without choices: {_error_text(reply.get('error'))}", retryable=True)
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise EndpointError("the endpoint answered a choice without a message", retryable=True)
    content = message.get("content")
    # JSON can hold a lone surrogate, which cannot be encoded when the answer is sent back or stored.
    written = content.encode("utf-8", "replace").decode() if isinstance(content, str) else ""
    text, whole = strip_reasoning(written)
    reason = choices[0].get("finish_reason")
    usage = reply.get("usage")
    prompt = _count(usage, "prompt_tokens", at_most=MAX_TOKENS_PER_CHARACTER * asked + TEMPLATE_TOKENS)
    # Hidden reasoning counts too, so a count up to the token limit is plausible even for a short text.
    received = sum(len(part.encode("utf-8", "replace")) for part in message.values() if isinstance(part, str))
    answer = _count(usage, "completion_tokens", at_most=max(received, max_tokens))
    return Completion(
        text=text,
        finish_reason="length" if not whole else reason if reason in _FINISHES else "unknown",
        prompt_tokens=prompt or asked // CHARACTERS_PER_TOKEN,
        completion_tokens=answer or len(written) // CHARACTERS_PER_TOKEN,
    )


def strip_reasoning(text: str) -> tuple[str, bool]:
    """Return `text` without its reasoning, and whether the reasoning was finished."""
    kept, start = [], 0
    unclosed: set[str] = set()
    """Kinds of tags that have no closing tag in the rest of the text. They are not searched for again, because reading
    would then take quadratic time."""
    for opening in _OPENING.finditer(text):
        kind = opening[1].lower()
        if opening.start() < start or kind in unclosed:
            continue
        if closing := _CLOSINGS[kind].search(text, opening.end()):
            kept.append(text[start : opening.start()])
            start = closing.end()
        else:
            unclosed.add(kind)
    text = "".join([*kept, text[start:]])
    if unended := _OPENING.search(text):
        return text[: unended.start()].strip(), False
    # Some chat templates put the opening tag into the prompt, so that the reply has only the closing tag.
    return _CLOSE_ONLY.sub("", text).strip(), True


def _error_text(error: object) -> str:
    words = error.get("message") if isinstance(error, dict) else error
    return words if isinstance(words, str) else "no words" if error else "no choices"


def _count(usage: object, key: str, *, at_most: int) -> int:
    """Return a number of tokens, bounded by `at_most`; 0 if there is none.

    A larger count may be true (a gateway's own prompt, hidden reasoning), but a false count must not use up the budget.
    """
    value = usage.get(key) if isinstance(usage, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return min(max(value, 0), at_most)


def read_models(body: bytes) -> dict[str, int | None]:
    """Return the names of the listed models, each with its context size if given; empty if `body` is no list."""
    try:
        reply = read_json(body)
    except ValueError:
        return {}
    models = reply.get("data") if isinstance(reply, dict) else None
    entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
    return {entry["id"]: _context(entry) for entry in entries if _is_name(entry.get("id"))}


def _is_name(found: object) -> bool:
    return isinstance(found, str) and len(found) <= LONGEST_NAME


def _context(entry: dict[str, Any]) -> int | None:
    """Return the context size of a listed model: the smallest size that it is served with, else its training size."""
    sources = [source for source in (entry, entry.get("meta")) if isinstance(source, dict)]
    for names in (_CONTEXTS, (_TRAINED_CONTEXT,)):
        numbers = [source.get(name) for source in sources for name in names]
        if found := [n for n in numbers if isinstance(n, int) and 1 < n <= LARGEST_CONTEXT]:  # True is an int, too
            return min(found)
    return None
