"""Reads a secret (a key, a password, a token) from a file, and refuses large or binary files named by mistake."""

import errno
import os
import select
import time
import unicodedata
from pathlib import Path

from protocol.runtime.paths import expanded

MOST_BYTES = 64 * 1024
"""Maximum size of a secret file. Every key, password or token is smaller."""


WAIT_SECONDS = 5.0
"""Maximum wait for data from a pipe, such as the pipe of a password manager."""


def read_secret(path: Path) -> str:
    """Return the text of a file without surrounding whitespace, such as a trailing newline.

    Raises OSError if the file cannot be read, and ValueError if it cannot be a secret. The ValueError does not show the
    content.
    """
    handle = os.open(expanded(path), os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would block forever
    try:
        content = _read(handle)
    finally:
        os.close(handle)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES // 1024} KiB, so it cannot be a secret")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ValueError("it must be one line of text without control characters")
    return text


def _read(handle: int) -> bytes:
    """Read at most MOST_BYTES + 1 bytes."""
    content, deadline = b"", time.monotonic() + WAIT_SECONDS
    while len(content) <= MOST_BYTES:
        try:
            piece = os.read(handle, MOST_BYTES + 1 - len(content))
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise OSError(errno.ETIMEDOUT, f"no data from it for {WAIT_SECONDS:g} seconds") from None
            continue
        if not piece:
            break
        content += piece
    return content
