"""A secret out of a file: a key, a password or a token, and never the gigabytes of a file that was named by mistake."""

import errno
import os
import select
import time
import unicodedata
from pathlib import Path

from protocol.runtime.paths import expanded

MOST_BYTES = 64 * 1024
"""Longer than any key, password or token."""


WAIT_SECONDS = 5.0
"""For what comes out of a pipe, such as that of a password manager."""


def read_secret(path: Path) -> str:
    """The text of a file without the whitespace around it, such as its last newline.

    Raises OSError where it cannot be read, and ValueError, which shows nothing of it, where it holds no secret.
    """
    handle = os.open(expanded(path), os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would block for ever
    try:
        content = _read(handle)
    finally:
        os.close(handle)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 1024} KiB, so it is no secret's file")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ValueError("it must be one line of text without control characters")
    return text


def _read(handle: int) -> bytes:
    """At most MOST_BYTES + 1 bytes."""
    content, deadline = b"", time.monotonic() + WAIT_SECONDS
    while len(content) <= MOST_BYTES:
        try:
            piece = os.read(handle, MOST_BYTES + 1 - len(content))
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise OSError(errno.ETIMEDOUT, f"nothing came out of it for {WAIT_SECONDS:g} seconds") from None
            continue
        if not piece:
            break
        content += piece
    return content
