"""Error messages for invalid settings: one sentence, which shows no secret."""

import difflib
import re
from collections.abc import Iterable, Mapping

import yaml
from pydantic import ValidationError


class Refused(yaml.YAMLError):
    """Raised for YAML that settings do not use; its message shows nothing of the text."""


_ITEM = re.compile(r"(?<=\.)\d+(?=\.)")
_MAY_HOLD_SECRETS = ("llm", "redis", "http")
"""Sections whose values are never shown, because any of them may hold a key or a password."""


_PLAIN = {
    "Input should be a valid number, unable to parse string as a number": "it must be a number, such as 0.3",
    "Input should be a valid integer, unable to parse string as an integer": "it must be a whole number, such as 12",
    "Input should be greater than 0": "it must be more than 0",
    "Input should be a valid tuple": "input should be a list",
}
"""Messages of Pydantic that are no plain English, and what is said in their place."""


def in_plain_words(message: str) -> str:
    """Return a message of Pydantic as a person would say it."""
    for theirs, ours in _PLAIN.items():
        message = message.replace(theirs, ours)
    return message


def validation_sentence(error: ValidationError, names: Iterable[str] = ()) -> str:
    """Return a sentence about the first error; `names` are all valid names, to suggest one for an unknown name.

    Unknown names come before missing ones, because a misspelt name is both.
    """
    errors = error.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown(name, names)
    if first["type"] == "missing":
        return f"the setting {name} is missing"
    message = in_plain_words(first["msg"].removeprefix("Value error, "))
    message = message[:1].lower() + message[1:]
    if not name:  # two settings that do not go together
        return message
    if first["input"] is None:
        return f"the setting {name} has no value"
    if name.partition(".")[0] in _MAY_HOLD_SECRETS:
        return f"{name} has an invalid value: {message}"
    if first["type"] == "value_error" and isinstance(first["input"], Mapping):  # two settings of one section
        return message
    return f"{name} cannot be {_one_line(first['input'])!r}: {message}"


def unknown(name: str, names: Iterable[str]) -> str:
    """Return a sentence that there is no setting `name`, with the nearest valid name."""
    in_list = _ITEM.search(name)
    if in_list:  # a field of an item of a list, such as llm.endpoints.0.url
        place = in_list.group()
        known = [each.replace("[]", place) for each in names]
    else:
        known = [each for each in names if "[]" not in each]
    if "." not in name:
        known += dict.fromkeys(each.partition(".")[0] for each in known)
    exact = [n for n in known if n.rpartition(".")[2] == name.rpartition(".")[2]]
    near = exact[:1] if "." not in name else []
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.5) or exact[:1]
    return f"there is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def file_sentence(file: object, error: Exception) -> str:
    """Return why a settings file cannot be read; of invalid YAML only the position, because its text may hold a key."""
    if isinstance(error, OSError):
        return f"the settings file {str(file)!r} cannot be read: {error.strerror}"
    if isinstance(error, UnicodeDecodeError):
        return f"{file} is not a YAML mapping of settings: it is not UTF-8 text"
    if isinstance(error, Refused):
        return f"the settings file {str(file)!r} is refused: {error}"
    mark = getattr(error, "problem_mark", None)
    where = f": invalid YAML at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{file} is not a YAML mapping of settings{where}"


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:120]
