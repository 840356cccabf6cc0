"""The body of a chat completion -> the text that counts. Pure.

Endpoints answer 200 with error objects, login pages, null choices and half-finished reasoning; each of these is told
apart here. Numbers inside a model's reasoning are never read as its answer.
"""

import json
import re
from dataclasses import dataclass

from protocol.errors import EndpointError

_REASONING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_OPEN_REASONING = re.compile(r"<(think|thinking|reasoning)>.*", re.DOTALL | re.IGNORECASE)
_CLOSE_ONLY = re.compile(r"\A.*</(think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)


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
            f"the endpoint answered {content_type or 'no content type'!r} where JSON is due", retryable=True
        )


def read_completion(body: bytes) -> Completion:
    """The first choice's text without its reasoning, and the token counts.

    Raises EndpointError (retryable) for anything that is not a chat completion: cut JSON, an error object, no choices.
    """
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):
        raise EndpointError(f"the endpoint's reply of {len(body)} bytes is not whole JSON", retryable=True) from None
    if not isinstance(reply, dict):
        raise EndpointError("the endpoint's reply is not a JSON object", retryable=True)
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        told = str(reply.get("error", "no choices"))[:200]
        raise EndpointError(f"the endpoint answered without choices: {told}", retryable=True)
    message = choices[0].get("message")
    if not isinstance(message, dict):
        raise EndpointError("the endpoint answered a choice without a message", retryable=True)
    content = message.get("content")
    # A lone surrogate, which JSON can hold, could not be encoded when the answer is sent back or kept.
    written = content.encode("utf-8", "replace").decode() if isinstance(content, str) else ""
    text, whole = strip_reasoning(written)
    reason = choices[0].get("finish_reason")
    usage = reply.get("usage")
    return Completion(
        text=text,
        finish_reason="length" if not whole else reason if isinstance(reason, str) else "unknown",
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
    )


def strip_reasoning(text: str) -> tuple[str, bool]:
    """`text` without its reasoning, and whether that reasoning came to an end."""
    text = _REASONING.sub("", text)
    if _OPEN_REASONING.search(text):
        return _OPEN_REASONING.sub("", text).strip(), False
    # Some chat templates put the opening tag into the prompt, so that only the closing one is seen.
    return _CLOSE_ONLY.sub("", text).strip(), True


def _count(usage: object, key: str) -> int:
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
