"""What --set and the environment say, checked before it is put together with the settings file."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_origin

import yaml
from pydantic import BaseModel

from daemon.setting_errors import unknown
from protocol.errors import SettingsError

ENV_PREFIX = "SELFPRUNER_"


def overrides_tree(overrides: Iterable[str], names: Iterable[str]) -> dict[str, Any]:
    """The values of --set by section. Raises SettingsError, which shows no value: it may be a key."""
    tree: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\s*[\w.-]+\s*", name):
            raise SettingsError("--set takes key=value, such as --set search.name=first")
        try:
            value = yaml.safe_load(text) if text else None
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date or a number that cannot be
            raise SettingsError(f"the value of {name} is no YAML") from None
        *path, last = name.strip().split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise SettingsError(unknown(name, names))
        branch[last] = value
    return tree


def check_environment(environ: Mapping[str, str], settings: type[BaseModel], names: Iterable[str]) -> None:
    """Raise SettingsError, which names it, for a variable that starts like ours and would be ignored, or is no JSON."""
    for variable, value in environ.items():
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        dotted = variable.upper().removeprefix(ENV_PREFIX).lower().replace("__", ".")
        if dotted.split(".")[0] not in settings.model_fields:
            raise SettingsError(f"the environment variable {variable} names no setting: {unknown(dotted, names)}")
        try:
            if _is_json(dotted, settings):
                json.loads(value)
        except (ValueError, RecursionError):
            raise SettingsError(f"the environment variable {variable} must hold JSON") from None


def _is_json(dotted: str, settings: type[BaseModel]) -> bool:
    """Whether the environment gives this setting as JSON: a section, or a list."""
    found: Any = settings
    for part in dotted.split("."):
        field = found.model_fields.get(part) if _is_section(found) else None
        if field is None:
            return False
        found = field.annotation
    return get_origin(found) is tuple or _is_section(found)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
