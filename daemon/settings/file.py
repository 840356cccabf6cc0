"""Reading settings from YAML, with limits on size, nesting and number of values.

A few lines of YAML can expand to more values than fit in memory (aliases of aliases), and YAML accepts a key that is
given twice, which is always a mistake here.
"""

from pathlib import Path
from typing import Any

import yaml

from daemon.settings.errors import Refused, file_sentence
from protocol.errors import SettingsError
from protocol.runtime.paths import expanded

MOST_BYTES = 64 * 1024
MOST_NODES = 20_000
"""Maximum number of keys and values; an alias counts each time it is used."""
DEEPEST = 20
"""Maximum nesting."""


class _Loader(yaml.SafeLoader):
    """Refuses deep nesting, more values than settings have, a value inside itself, and a key that is given twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node; an alias counts as everything that it expands to."""
        if self._depth == DEEPEST:
            raise Refused(f"it has more than {DEEPEST} levels")
        is_alias, before = self.check_event(yaml.AliasEvent), self._nodes
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias and node not in self._sizes:
            raise Refused("it has a value that contains itself")
        self._nodes += self._sizes[node] if is_alias else 1
        if self._nodes > MOST_NODES:
            raise Refused(f"it has more than {MOST_NODES:,} values")
        if not is_alias:
            self._sizes[node] = self._nodes - before
            _check_keys(node)
        return node


def _check_keys(node: yaml.Node) -> None:
    """Refuse a mapping that gives a key twice; the sentence does not show the key, which may be a secret."""
    known = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key
        if name in known:
            raise Refused(f"line {key.start_mark.line + 1} repeats a key")
        known.add(name)


def parsed(text: str) -> Any:
    """Return the value of YAML text. Raises yaml.YAMLError; a Refused shows nothing of the text."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    # PyYAML converts the text of a number, a date or a boolean without checking it, and leaves any error as it is.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise Refused("it has a value that does not match its YAML type") from None
    finally:
        loader.dispose()


def read(path: Path) -> dict[str, Any]:
    """Return the settings in a file, by section. Raises SettingsError with one sentence."""
    file = expanded(path)
    if not file.is_file():
        is_there = file.exists()
        raise SettingsError(f"{str(path)!r} is not a file" if is_there else f"there is no settings file {str(path)!r}")
    try:
        with file.open("rb") as opened:
            content = opened.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise SettingsError(f"the settings file {str(path)!r} has more than {MOST_BYTES // 1024} KiB")
        found = parsed(content.decode("utf-8-sig"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(file_sentence(path, error)) from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SettingsError(file_sentence(path, TypeError()))
    return found
