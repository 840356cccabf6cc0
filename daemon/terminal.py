"""How commands answer: one JSON object, or lines for a person; and what they say when a package is missing."""

import json
import sys
from importlib.util import find_spec
from typing import Any

import yaml
from rich.console import Console

from protocol.errors import SettingsError


def need(package: str, extra: str) -> None:
    """Raise SettingsError, with the pip line, where `package` is not installed."""
    if find_spec(package) is None:
        raise SettingsError(f"this needs the package {package}: pip install 'self-pruner[{extra}]'")


def answer(answer: dict[str, Any], json_: bool) -> None:
    """Print an answer as YAML, or as one JSON object."""
    if json_:
        print_json(answer)
    else:
        Console().print(
            yaml.safe_dump(answer, sort_keys=False, allow_unicode=True, default_flow_style=None, width=10_000),
            end="",
            soft_wrap=True,
        )


def print_json(answer: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(answer, allow_nan=False, ensure_ascii=False) + "\n")
