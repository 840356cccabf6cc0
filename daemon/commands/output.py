"""How commands answer: one JSON object, or lines for a person; and what they say when a package is missing."""

import json
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

from rich.console import Console, RenderableType

from protocol.errors import SettingsError

UNWRAPPED = 1000
"""Columns of an output that is no terminal: a table in a file is not cut to the width of a screen that is not there."""


def need(package: str, extra: str) -> None:
    """Raise SettingsError, with the pip line, where `package` is not installed."""
    if find_spec(package) is None:
        raise SettingsError(f"this needs the package {package}: pip install 'self-pruner[{extra}]'")


def answer(answer: dict[str, Any], json_: bool, in_words: Callable[[], Iterable[RenderableType]]) -> None:
    """Print an answer: one JSON object, or what `in_words` makes of it for a person."""
    if json_:
        print_json(answer)
        return
    console = stdout_console()
    for part in in_words():
        console.print(part, soft_wrap=isinstance(part, str))


def print_json(answer: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(answer, allow_nan=False, ensure_ascii=False) + "\n")


def stdout_console() -> Console:
    """Stdout for tables and lines; names of models and texts are no markup."""
    width = None if sys.stdout.isatty() else UNWRAPPED
    return Console(width=width, markup=False, highlight=False, emoji=False)
