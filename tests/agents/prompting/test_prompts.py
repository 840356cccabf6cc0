"""The exact text of every prompt, filled for a small model and compared with golden/.

After an intended change, renew the texts with `RENEW_GOLDEN=1 pytest tests/agents/prompting` and read the difference.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from agents.crossover import Crossover
from agents.initializer import Initializer
from agents.llm.endpoint import Answer, Question
from agents.mutator import Mutator
from agents.population.view import Accepted, Member, Tried, View
from agents.prompting.descriptions import about_model
from agents.prompting.prompts import fill
from agents.prompting.settings import AgentSettings, FeedbackPart, ReplyFormat
from agents.selector import Selector
from protocol.errors import EndpointError
from protocol.plans.candidate import Provenance
from protocol.plans.shape import Granularity
from protocol.plans.spec import Measure
from tests.support.samples import PROFILE, SPEC, candidate

GOLDEN = Path(__file__).parent / "golden"
AGENTS = ("initializer", "mutator", "crossover", "selector")


class Listener:
    """Records the prompts and answers none."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def ask(self, question: Question) -> Answer:
        self.prompts.append("\n\n".join(f"<{m['role']}>\n{m['content']}" for m in question.messages) + "\n")
        raise EndpointError("down", retryable=True)


async def accept(rates: Sequence[float], provenance: Provenance) -> Accepted:
    return Accepted(f"{hash(tuple(rates)) % 2**64:016x}")


def view_of(granularity: Granularity, *, sensitivity: bool = True, measure: Measure = "perplexity") -> View:
    spec = SPEC.model_copy(update={"granularity": granularity, "measure": measure})
    units = len(PROFILE.shape.units(granularity))
    profile = PROFILE.model_copy(
        update={"sensitivity": tuple(0.4 / (1 + i) for i in range(units)) if sensitivity else ()}
    )
    members = tuple(
        Member(
            candidate(tuple(0.3 + shift * (2 * i / (units - 1) - 1) for i in range(units)), spec=spec, rule=rule),
            20.0 + rank if measure == "perplexity" else 0.4 + rank / 300,
        )
        for rank, (shift, rule) in enumerate(
            ((0.2, None), (0.1, "rate - 0.1 + 0.2*depth"), (0.05, "rate + 0.1*depth"), (-0.1, None))
        )
    )
    return View(spec, profile, 1, members, {}, members)


PARTS: dict[FeedbackPart, str] = {
    "weakest": "would gain most from less pruning",
    "contrast": "Good configurations differ",
    "effects": "What earlier changes did",
}


async def prompt_of(
    agent: str,
    reply: ReplyFormat,
    view: View,
    feedback: tuple[FeedbackPart, ...] = ("sensitivity", "effects"),
) -> str:
    chat = Listener()
    settings = AgentSettings(reply=reply, proposals_per_call=2, feedback=feedback)
    count, view = 2, replace(view, step="rules" if reply == "rules" else None)
    match agent:
        case "initializer":
            await Initializer(chat, settings).propose(view, count, accept)
        case "selector":
            await Selector(chat, settings, chooses_step=reply == "rules").select(view, 2)
        case "mutator":
            await Mutator(chat, settings).propose(view, view.population, count, accept)
        case _:
            await Crossover(chat, settings).propose(view, view.population, count, accept)
    return chat.prompts[0]


def check_golden(name: str, text: str) -> None:
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("RENEW_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


every_agent = pytest.mark.parametrize("agent", AGENTS)
every_reply = pytest.mark.parametrize("reply", get_args(ReplyFormat))
every_granularity = pytest.mark.parametrize("granularity", ["layer", "block"])


@every_granularity
@every_reply
@every_agent
async def test_every_prompt_reads_as_its_golden_text(agent: str, reply: ReplyFormat, granularity: Granularity) -> None:
    check_golden(f"{agent}_{reply}_{granularity}", await prompt_of(agent, reply, view_of(granularity)))


@every_granularity
@every_reply
@every_agent
async def test_prompts_of_a_search_that_minimises_divergence_speak_of_it_and_not_of_perplexity(
    agent: str, reply: ReplyFormat, granularity: Granularity
) -> None:
    text = await prompt_of(agent, reply, view_of(granularity, measure="kl"))
    assert "KL divergence" in text and "perplexity" not in text.lower()
    check_golden(f"{agent}_{reply}_{granularity}_kl", text)


@every_reply
@every_agent
async def test_nothing_is_said_of_fragile_units_where_none_are_known(agent: str, reply: ReplyFormat) -> None:
    text = await prompt_of(agent, reply, view_of("layer", sensitivity=False))
    assert "ragile" not in text and "hurt" not in text


@pytest.mark.parametrize("reply", ["lists", "edits", "moves"])
async def test_each_part_of_the_feedback_has_a_switch(reply: ReplyFormat) -> None:
    view = view_with_history()
    everything = await prompt_of("mutator", reply, view, get_args(FeedbackPart))
    check_golden(f"mutator_{reply}_feedback", everything)
    nothing = await prompt_of("mutator", reply, view, ())
    for part, words in PARTS.items():
        assert words in everything and words not in nothing
        alone = await prompt_of("mutator", reply, view, (part,))
        assert [other for other in PARTS if PARTS[other] in alone] == [part]


async def test_prompts_for_rules_say_where_a_rule_is_wrong_and_what_changes_did() -> None:
    view = view_with_history()
    text = await prompt_of("mutator", "rules", view)
    check_golden("mutator_rules_feedback", text)
    assert (
        "The best configuration so far differs from this rule" in text and "What earlier changes of rules did" in text
    )
    assert "What earlier changes of rules did" not in await prompt_of("mutator", "rules", view, ("sensitivity",))


def test_what_was_wrong_reads_as_its_golden_text() -> None:
    problems = ["Configuration 1 has 3 numbers instead of 4.", "Configuration 2: it is known."]
    check_golden("reask", fill("reask", problems=problems, missing=2) + "\n")


def view_with_history() -> View:
    """A view of eight members, some of which are offspring of others."""
    view = view_of("block")
    units = len(view.units)
    first = view.population[0]
    children = []
    for i in range(4):
        shift = 0.04 * (i + 1)
        rates = [r + shift * (j == i) - shift * (j == 7 - i) for j, r in enumerate(first.candidate.rates)]
        child = candidate(tuple(rates[:units]), spec=view.spec)
        who = child.provenance.model_copy(update={"parents": (first.candidate.id,), "round": 1 + i % 2})
        if i == 3:
            rule = view.population[1].candidate
            who = who.model_copy(update={"parents": (rule.id,), "rule": "rate - 0.05 + 0.1*depth"})
        children.append(Member(child.model_copy(update={"provenance": who}), 19.0 + 2 * i))
    measured = tuple(sorted((*view.population, *children), key=lambda m: m.fitness))
    recent = tuple(Tried(m.candidate, m.fitness) for m in measured)
    return View(view.spec, view.profile, 3, measured[:4], {}, measured, recent)


@pytest.mark.parametrize(
    ("prompt", "variables", "named"),
    [
        ("reask", {"problems": []}, "missing"),
        ("reask", {"problems": [], "missing": 1, "mood": "good"}, "mood"),
        ("mutator_lists", {"count": 1, "members": []}, "about"),  # which an included part needs
    ],
)
def test_a_missing_or_unused_variable_is_an_error(prompt: str, variables: dict[str, object], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        fill(prompt, **variables)


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("/home/me/secret project/My-8B", "My-8B"),
        ("~/models/My-8B.gguf", "My-8B.gguf"),
        ("./My-8B/", "My-8B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("smollm2", "smollm2"),
    ],
)
def test_a_prompt_names_the_model_without_the_folders_of_this_machine(model: str, shown: str) -> None:
    view = view_of("block")
    view = replace(view, profile=view.profile.model_copy(update={"model": model}))
    assert about_model(view, ()).model == shown
