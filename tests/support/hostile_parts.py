"""Building blocks of hostile replies, and the list that collects them."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

How = Literal["close", "open", "reset", "drip", "repeat"]
"""`close`: send all and close. `open`: send all and leave the connection open. `reset`: send all, then a TCP reset.
`drip`: one byte every few milliseconds, then leave it open. `repeat`: the same bytes again and again, without end."""
Make = Callable[[random.Random, bytes], bytes]

MB = 1024 * 1024


@dataclass(frozen=True)
class Hostile:
    """One kind of hostile reply."""

    name: str
    make: Make
    how: How = "close"
    refuses: bool = False
    """Whether the reply says that the endpoint rejects all our questions (wrong key, unknown model, quota)."""

    def __str__(self) -> str:
        return self.name


def http(
    body: bytes, status: str = "200 OK", content_type: str = "application/json", headers: str = "", length: bool = True
) -> bytes:
    """A response; `headers` are whole lines."""
    counted = f"content-length: {len(body)}\r\n" if length else ""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\n{counted}{headers}connection: close\r\n\r\n"
    return head.encode("utf-8", "surrogateescape") + body


def as_json(value: object) -> bytes:
    """The body of a response in JSON."""
    return json.dumps(value).encode()


def completion(content: object, usage: object = None, finish_reason: object = "stop", **more: object) -> bytes:
    """The body of a completion whose message has this `content`."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content}}
    counted = {"prompt_tokens": 10, "completion_tokens": 5} if usage is None else usage
    return as_json({"id": "1", "object": "chat.completion", "choices": [choice], "usage": counted, **more})


def raw_usage(count: str) -> bytes:
    """Return a completion with this JSON text as its token counts."""
    return completion("x", "COUNTS").replace(
        b'"COUNTS"', f'{{"prompt_tokens": {count}, "completion_tokens": {count}}}'.encode()
    )


def error(message: object, status: str = "500 Internal Server Error", headers: str = "", **more: object) -> bytes:
    """Return an error in OpenAI's format."""
    return http(as_json({"error": {"message": message, **more}}), status, headers=headers)


def key_in(request: bytes) -> bytes:
    """Return the API key in the request."""
    for line in request.split(b"\r\n\r\n", 1)[0].split(b"\r\n"):
        if line.lower().startswith(b"authorization:"):
            return line.split(b" ", 2)[-1]
    return b"no-key-was-sent"


def noise(rng: random.Random, most: int) -> bytes:
    """Random bytes."""
    return rng.randbytes(rng.randint(1, most))


KINDS: list[Hostile] = []
BY_NAME: dict[str, Hostile] = {}


def add(name: str, reply: bytes | Make, how: How = "close", *, refuses: bool = False) -> None:
    """Add one kind to the list; bytes are sent unchanged."""
    assert name not in BY_NAME, name
    make: Make = (lambda _rng, _request: reply) if isinstance(reply, bytes) else reply
    BY_NAME[name] = kind = Hostile(name, make, how, refuses)
    KINDS.append(kind)
