"""Quotes values from files in error messages."""

MAX_CHARACTERS = 60
"""Longest part of a value that an error message quotes."""


def quoted(value: object) -> str:
    """Return a value for an error message: short and on one line, whatever the file contains."""
    text = repr(value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"
