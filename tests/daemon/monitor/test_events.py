"""docs/reference/events.md names every event that the code logs, with its fields and its level, and no other."""

import ast
import re
from dataclasses import dataclass
from functools import cache

import pytest

from tests.support.root import ROOT

LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}
NAMED_ELSEWHERE = {"observer_died", "server_watch_died", "tracker_died"}
"""Given as an argument to what logs it."""


@dataclass(frozen=True)
class Event:
    """What the code or the table says of an event."""

    name: str
    level: str
    fields: frozenset[str]
    has_more: bool = False
    """Fields that are not written out in the call."""


@cache
def logged() -> list[Event]:
    """Every call of a logger with a literal name."""
    files = [
        path for folder in ("protocol", "agents", "daemon", "gpu_worker") for path in (ROOT / folder).rglob("*.py")
    ]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    return [event for node in nodes if isinstance(node, ast.Call) and (event := _event(node))]


def _event(call: ast.Call) -> Event | None:
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in LEVELS:
        return None
    if ast.unparse(call.func.value) not in ("log", "structlog.get_logger()"):
        return None
    name = call.args[0]
    if not isinstance(name, ast.Constant) or not isinstance(name.value, str):
        return None
    fields = frozenset(keyword.arg for keyword in call.keywords if keyword.arg)
    level = "error" if call.func.attr == "exception" else call.func.attr
    return Event(name.value, level, fields, len(fields) < len(call.keywords))


@cache
def described() -> dict[str, Event]:
    """The rows of the table."""
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| .* \| (.*)\|$", (ROOT / "docs" / "reference" / "events.md").read_text(), re.MULTILINE
    )
    return {name: Event(name, level, frozenset(re.findall(r"`(\w+)`", fields))) for name, level, fields in rows}


def test_the_table_names_the_events_of_the_code_and_no_other() -> None:
    in_code = {event.name for event in logged()} | NAMED_ELSEWHERE
    assert len(in_code) > 50
    assert set(described()) == in_code
    assert list(described()) == sorted(described())


@pytest.mark.parametrize("name", sorted({event.name for event in logged()}))
def test_an_events_level_and_fields_are_in_the_table(name: str) -> None:
    row, calls = described()[name], [event for event in logged() if event.name == name]
    assert {event.level for event in calls} == {row.level}
    written_out = frozenset().union(*(event.fields for event in calls))
    if any(event.has_more for event in calls):
        assert written_out <= row.fields
    else:
        assert written_out == row.fields


def test_an_events_name_is_words_joined_by_underscores() -> None:
    assert all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", event.name) for event in logged())
