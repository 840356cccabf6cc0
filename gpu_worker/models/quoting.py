"""Values from files, in sentences for people."""

MAX_CHARACTERS = 60
"""Characters of a value that a sentence shows."""


def quoted(value: object) -> str:
    """A value as an error shows it: short and on one line, whatever the file holds."""
    text = repr(value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"
