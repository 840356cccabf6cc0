"""A secret out of a file: a key, a password or a token, and never the gigabytes of a file that was named by mistake."""

from pathlib import Path

from protocol.paths import expanded

MOST_BYTES = 64 * 1024
"""Longer than any key; certificates in one file are shorter too."""


def read_secret(path: Path) -> str:
    """The text of a file without the whitespace around it, such as its last newline.

    Raises OSError where it cannot be read, and ValueError, which shows nothing of it, where it holds no secret.
    """
    with expanded(path).open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 1024} KiB, so it is no secret's file")
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
