"""Values from files, in sentences for people."""

LONGEST = 60
"""Characters of a value that a sentence shows."""


def shown(value: object) -> str:
    """A value as an error shows it: short and on one line, whatever the file holds."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
