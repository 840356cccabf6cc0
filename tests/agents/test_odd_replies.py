"""No reply of an LLM becomes a candidate that is off budget, or ends an agent."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.crossover import Crossover
from agents.initializer import Initializer
from agents.mutator import Mutator
from agents.population.view import Accepted, Refused, View
from agents.prompting.settings import AgentSettings, ReplyFormat
from agents.selector import Selector
from protocol.errors import BudgetError
from protocol.plans.candidate import Provenance
from protocol.plans.features import FEATURES
from protocol.plans.shape import Granularity
from tests.agents.prompting.test_prompts import view_of
from tests.agents.test_agents import ScriptedChat

KEYS = "proposals configurations profile attention mlp keep parent parents changes first last points block layers"
WORDS = f"{KEYS} moves mix rule".split(" ")
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30), st.integers(0, 8), st.floats(0, 1), st.floats(allow_nan=True, allow_infinity=True)
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(("both", "1+2", "mlp 0")))
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=9), st.dictionaries(st.sampled_from(WORDS), inner, min_size=1, max_size=4)
    ),
    max_leaves=25,
)
RULES = st.lists(
    st.sampled_from((*FEATURES, *"+-*/(),<>", "0.1", "7e9", "nan", "exp", "where", "min")), max_size=9
).map(" ".join)
FITTING = st.one_of(
    st.fixed_dictionaries({"moves": st.lists(st.integers(-2, 20), max_size=5)}),
    st.fixed_dictionaries({"mix": st.integers(-2, 20)}),
    st.fixed_dictionaries({"rule": RULES}),
    st.fixed_dictionaries(
        {
            "parent": st.integers(-1, 6),
            "changes": st.lists(
                st.fixed_dictionaries(
                    {"first": st.integers(-1, 5), "last": st.integers(-1, 5), "points": st.integers(-120, 120)},
                    optional={"block": st.sampled_from(("attention", "mlp", "both"))},
                ),
                max_size=4,
            ),
        }
    ),
    st.fixed_dictionaries(
        {"parents": st.sampled_from(("1+2", "2+1", "1+1", "9+1", "+")), "first": st.integers(-1, 5)},
        optional={"layers": st.integers(-1, 5), "block": st.sampled_from(("both", "mlp"))},
    ),
    st.fixed_dictionaries(
        {name: st.lists(st.integers(-5, 120), max_size=6) for name in ("profile", "attention", "mlp")}
    ),
    st.lists(st.floats(-0.2, 1.2), min_size=3, max_size=9),
)
REPLIES = st.one_of(
    st.text(max_size=60),
    JSON.map(json.dumps),
    st.lists(FITTING, min_size=1, max_size=3).map(lambda items: json.dumps({"proposals": items})),
    st.lists(FITTING, min_size=1, max_size=3).map(lambda items: "Sure!\n" + "\n".join(map(json.dumps, items))),
)


@pytest.fixture(autouse=True, scope="module")
def _short_optimisations() -> Iterator[None]:
    """A candidate meets the budget, however long the surrogate was asked before."""
    with pytest.MonkeyPatch.context() as patched:
        for module in ("rules", "trust_region"):
            patched.setattr(f"agents.operators.{module}.GENERATIONS", 2)
        yield


async def ask_everybody(view: View, reply: ReplyFormat, text: str) -> list[tuple[float, ...]]:
    """Return all rates that the four agents submit if the LLM always answers `text`."""
    submitted: list[tuple[float, ...]] = []

    async def submit(rates: Sequence[float], _: Provenance) -> Accepted | Refused:
        submitted.append(tuple(rates))
        return Accepted(f"{len(submitted):016x}")

    chat = ScriptedChat(lambda _: text)
    how = (chat, AgentSettings(reply=reply, reasks=1))
    await Initializer(*how).propose(view, 2, submit)
    parents = (await Selector(*how).select(view, 3)).parents
    await Mutator(*how).propose(view, parents, 2, submit)
    await Crossover(*how).propose(view, parents, 2, submit)
    return submitted


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("reply", get_args(ReplyFormat))
@given(text=REPLIES)
@settings(max_examples=20, deadline=None)
def test_no_reply_becomes_rates_off_budget(reply: ReplyFormat, granularity: Granularity, text: str) -> None:
    view = view_of(granularity)
    spec, shape = view.spec, view.profile.shape
    submitted = asyncio.run(ask_everybody(view, reply, text))
    assert len(submitted) >= 6  # the fallback makes the rest
    for rates in submitted:
        try:
            plan = spec.plan(spec.feasible(rates, shape), shape)
        except BudgetError:
            continue  # reported to the LLM, and no candidate
        left = plan.decoder_parameters(shape)
        assert abs(left - (1 - spec.rate) * shape.decoder_parameters) <= shape.channel_parameters
