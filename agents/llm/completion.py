"""The body of a chat completion -> the text that counts. Pure.

Endpoints answer 200 with error objects, login pages, null choices and half-finished reasoning; each of these is told
apart here. Numbers inside a model's reasoning are never read as its answer. Everything takes time that is linear in the
reply, and no number is believed that cannot be.
"""

import re
from dataclasses import dataclass

from agents.llm.bodies import read_json
from protocol.errors import EndpointError

LONGEST_REPLY = 400_000
"""Characters of an answer that are read; thirty lists of 160 rates are 50,000."""
CHARACTERS_PER_TOKEN = 4
"""Used where an endpoint does not count: a budget must not go blind."""
MOST_TOKENS_PER_CHARACTER = 2
"""Prompt tokens that are believed; a tokenizer that falls back to bytes makes up to four of a rare character, and our
prompts are ASCII."""
TEMPLATE_TOKENS = 2_000
"""Prompt tokens that are believed beside these: a chat template and a provider's own instructions."""
_FINISHES = ("stop", "length", "content_filter", "tool_calls", "function_call")

_TAG = "(think|thinking|reasoning)"
_FLAGS = re.DOTALL | re.IGNORECASE | re.ASCII
_OPENING = re.compile(f"<{_TAG}>", _FLAGS)
_CLOSINGS = {kind: re.compile(f"</{kind}>", _FLAGS) for kind in ("think", "thinking", "reasoning")}
_CLOSE_ONLY = re.compile(rf"\A.*</{_TAG}>", _FLAGS)


@dataclass(frozen=True)
class Completion:
    """What one HTTP reply holds. `text` is empty where the model refused or spent all its tokens on reasoning."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def check_content_type(content_type: str) -> None:
    """Raise EndpointError unless this is JSON: a login page or a proxy's error page also comes as 200."""
    if "json" not in content_type.lower():
        raise EndpointError(
            f"the endpoint answered {content_type or 'no content type'} where JSON is due", retryable=True
        )


def read_completion(body: bytes, *, asked: int, max_tokens: int) -> Completion:
    """The first choice's text without its reasoning, and the token counts.

    `asked` is the number of characters that were sent, `max_tokens` the limit that was: larger token counts than these
    allow are bounded. Raises EndpointError (retryable) for anything that is not a chat completion: cut JSON, an error
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
        raise EndpointError(f"the endpoint answered without choices: {_told(reply.get('error'))}", retryable=True)
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise EndpointError("the endpoint answered a choice without a message", retryable=True)
    content = message.get("content")
    # A lone surrogate, which JSON can hold, could not be encoded when the answer is sent back or kept.
    written = content.encode("utf-8", "replace").decode() if isinstance(content, str) else ""
    text, whole = strip_reasoning(written)
    reason = choices[0].get("finish_reason")
    usage = reply.get("usage")
    prompt = _count(usage, "prompt_tokens", most=MOST_TOKENS_PER_CHARACTER * asked + TEMPLATE_TOKENS)
    # Hidden reasoning counts too, so the limit that was sent is believed beside the text that came.
    came = sum(len(part.encode("utf-8", "replace")) for part in message.values() if isinstance(part, str))
    answer = _count(usage, "completion_tokens", most=max(came, max_tokens))
    return Completion(
        text=text,
        finish_reason="length" if not whole else reason if reason in _FINISHES else "unknown",
        prompt_tokens=prompt or asked // CHARACTERS_PER_TOKEN,
        completion_tokens=answer or len(written) // CHARACTERS_PER_TOKEN,
    )


def strip_reasoning(text: str) -> tuple[str, bool]:
    """`text` without its reasoning, and whether that reasoning came to an end."""
    kept, start = [], 0
    unclosed: set[str] = set()
    """Kinds of tags that are closed nowhere behind. Each is looked for once: of many tags that would take too long."""
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
    # Some chat templates put the opening tag into the prompt, so that only the closing one is seen.
    return _CLOSE_ONLY.sub("", text).strip(), True


def _told(error: object) -> str:
    """Return the words of an error object."""
    words = error.get("message") if isinstance(error, dict) else error
    return words if isinstance(words, str) else "no words" if error else "no choices"


def _count(usage: object, key: str, *, most: int) -> int:
    """Return a number of tokens, at most `most`; 0 where there is none.

    A count above `most` may be true (a gateway's own prompt, hidden reasoning). If not, it must not rob the budget.
    """
    value = usage.get(key) if isinstance(usage, dict) else None
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    return min(max(value, 0), most)
