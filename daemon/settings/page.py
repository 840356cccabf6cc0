"""`python -m daemon.settings.page > docs/reference/configuration.md`: the reference of settings."""

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from daemon.settings.llm import EndpointSettings
from daemon.settings.settings import Settings

HEAD = """# Configuration

<!-- Made by `python -m daemon.settings.page > docs/reference/configuration.md`; change daemon/settings/ instead. -->

Every setting has one dotted name. It can be given in a YAML file (`selfpruner run FILE`), in the environment (upper
case, `SELFPRUNER_SEARCH__NAME=first`) and on the command line (`--set search.name=first`); the later one wins. Lists
are JSON in the environment and YAML after `--set`. An unknown name is an error that names the nearest right one.

The folder `configs/` has files to start from: `quickstart.yaml` (what `selfpruner run` does without a file),
`paper.yaml` (the paper's search), `best.yaml` (the best that we know), `local-llm.yaml` (an LLM server of your own) and
`docker.yaml` (Docker Compose).
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for name, field in Settings.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        parts.append(f"## {name}\n\n{_sentence(section.__doc__)}\n\n{_table(section, name + '.')}")
        if name == "llm":
            parts.append(f"### Each of llm.endpoints\n\n{_sentence(EndpointSettings.__doc__)}\n")
            parts.append(_table(EndpointSettings, ""))
    return "\n".join(parts)


def _table(section: type[BaseModel], prefix: str) -> str:
    rows = ["| setting | default | what it does |", "| --- | --- | --- |"]
    for name, field in section.model_fields.items():
        rows.append(f"| `{prefix}{name}` | {_default(field)} | {_sentence(field.description)} |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if value is PydanticUndefined:
        return "must be given"
    if value is None or value == ():
        return "none"
    return f"`{value}`" if not isinstance(value, Path) else f"`{value}/`"


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
