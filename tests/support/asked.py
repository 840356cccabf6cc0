"""The JSON schemas of all replies that agents ask for."""

from collections.abc import Callable

from agents.population.view import View
from agents.prompting.schemas import (
    choice_schema,
    lists_schema,
    mix_schema,
    mixes_schema,
    moves_schema,
    mutation_schema,
    profile_schema,
)

ASKED: dict[str, Callable[[View], dict[str, object]]] = {
    "profiles": lambda view: profile_schema(view, 2),
    "mutations": lambda view: mutation_schema(view, 3, 2),
    "mixes": lambda view: mix_schema(view, 3, 1),
    "choices": lambda view: choice_schema(12, 6, ()),
    "choices with steps": lambda view: choice_schema(12, 6, ("rules", "moves")),
    "moves": lambda _: moves_schema(10, 3, 2),
    "numbers of mixes": lambda _: mixes_schema(8, 1),
    "lists": lambda view: lists_schema(len(view.units), 2),
}
