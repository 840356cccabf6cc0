"""The body of a response in JSON. Pure."""

import json
import re

MOST_PARTS = 50_000
"""Lists and objects of one body; a list of 400 models has 5,000. Each costs many times its three bytes in memory, and
the garbage collector looks through all of them again and again."""
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


def read_json(body: bytes) -> object:
    """Return what `body` holds. Raises ValueError where it is not JSON, is nested too deep, or has too many parts."""
    if _brackets(body) > MOST_PARTS and _brackets(_STRING.sub(b"", body)) > MOST_PARTS:
        raise ValueError("too many lists and objects")
    try:
        value: object = json.loads(body)
    except RecursionError:
        raise ValueError("nested too deep") from None
    return value


def _brackets(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")
