"""How the long stages say how far they are."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, the steps done and all steps of the stage."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""
