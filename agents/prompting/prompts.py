"""Prompts: templates in `prompts/`, and filled prompts with the schema and the parser of their reply."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Generic, TypeVar

from jinja2 import Environment, FunctionLoader, StrictUndefined, meta

from agents.prompting.replies import Parsed

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt(Generic[T]):
    """A filled prompt with the schema and the parser of its reply."""

    name: str
    """Name of the template; it also names the schema."""
    text: str
    schema: Callable[[int], dict[str, object]]
    """Returns the schema of a reply with the given number of items."""
    parse: Callable[[str, int], Parsed[T]]
    """Parses a reply with at most the given number of items."""
    tokens_per_item: int
    """Approximate tokens of one item."""
    refine: Callable[[T], T] | None = None
    """Improves an item before it is taken. It may take a second, so it is called in a thread."""
    preview: Callable[[T], str] | None = None
    """Says what is predicted of a refined item, for llm.what_if. None if nothing can be predicted."""


def fill(name: str, **variables: object) -> str:
    """Return the prompt `name`; raise TypeError if `variables` are not exactly those that its template uses."""
    used = _variables(name)
    if used != set(variables):
        wrong = ", ".join(sorted(used ^ set(variables)))
        raise TypeError(f"prompt {name}: missing or unused variables: {wrong}")
    return _ENVIRONMENT.get_template(name).render(**variables).strip()


@cache
def _variables(name: str) -> set[str]:
    """Return the variables of the template and of the parts that it includes."""
    tree = _ENVIRONMENT.parse(_read(name))
    parts = [part for part in meta.find_referenced_templates(tree) if part]
    return meta.find_undeclared_variables(tree).union(*(_variables(part) for part in parts))


def _read(name: str) -> str:
    return resources.files("prompts").joinpath(f"{name}.j2").read_text(encoding="utf-8")


_ENVIRONMENT = Environment(
    loader=FunctionLoader(_read), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
)
