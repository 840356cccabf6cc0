"""What is wrong with the flags of a command, in one sentence: Typer says it in a box, with words of its libraries."""

from typing import Any

import typer

FLAG_ERROR: Any = typer.BadParameter.__mro__[1]
"""Click's UsageError. Typer came with Click beside it and has it within since, so it has no name that both know."""

ELSEWHERE = {
    "--heads": (
        "--heads is for `selfpruner evaluate` alone: any heads are masked, and cannot be exported or searched over"
    )
}
"""Options that a person may look for in the wrong command, and why it does not have them."""


def flag_sentence(error: Any) -> str:
    """The error, and where the help is."""
    if hasattr(error, "possibilities") and error.option_name in ELSEWHERE:  # Click's NoSuchOption
        return ELSEWHERE[error.option_name]
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    help_of = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
    return f"{message[:1].lower()}{message[1:]}{help_of}"
