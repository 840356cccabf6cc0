"""The agents with a scripted LLM: accepted replies, re-asks, and the fallback."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from agents.crossover import Crossover
from agents.initializer import Initializer
from agents.llm.endpoint import Answer, Message, Question
from agents.mutator import Mutator
from agents.population.view import BUDGET_USED_UP, Accepted, Member, Refused, View
from agents.prompting.settings import AgentSettings
from agents.selector import Selector
from protocol.errors import EndpointError
from protocol.plans.candidate import Provenance, candidate_id
from tests.support.samples import PROFILE, SHAPE, SPEC, candidate, candidates

MEMBERS = tuple(Member(c, 20.0 + i) for i, c in enumerate(candidates(6)))
VIEW = View(SPEC, PROFILE, 1, MEMBERS)
RULED = Member(candidate((0.1, 0.3, 0.4, 0.4), rule="rate - 0.2*first"), 20.0)
EDITS = AgentSettings(reply="edits")
LISTS = AgentSettings(reply="lists")
Script = Callable[[int], str | Exception]


class ScriptedChat:
    """Answers the n-th question, counted from 0, with `script(n)`; records every question."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.conversations: list[list[Message]] = []
        self.questions: list[Question] = []
        self.finish_reason = "stop"

    async def ask(self, question: Question) -> Answer:
        number = len(self.conversations)
        # A message that cannot be encoded fails here.
        json.dumps([dict(m) for m in question.messages], ensure_ascii=False).encode()
        self.conversations.append(list(question.messages))
        self.questions.append(question)
        reply = self.script(number)
        if isinstance(reply, Exception):
            raise reply
        return Answer(reply, "scripted", 100, 20, 0.1, self.finish_reason)


class Desk:
    """Plans submitted rates and refuses known plans, as the search does."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.accepted: dict[str, Provenance] = {}
        self.refused = 0

    async def submit(self, rates: Sequence[float], provenance: Provenance) -> Accepted | Refused:
        assert len(rates) == len(SHAPE.units(SPEC.granularity))
        if len(self.accepted) >= self.room:
            self.refused += 1
            return BUDGET_USED_UP
        id_ = candidate_id(SPEC.plan(SPEC.feasible(tuple(rates), SHAPE), SHAPE), SPEC.fingerprint)
        if id_ in self.accepted:
            self.refused += 1
            return Refused("it prunes the model exactly as an earlier configuration does")
        self.accepted[id_] = provenance
        return Accepted(id_)

    def sources(self) -> list[str]:
        return [provenance.source for provenance in self.accepted.values()]


def profile(n: int) -> str:
    """A different profile for each n."""
    return json.dumps({"proposals": [{"keep": [], "profile": [10 + n, 20, 40, 50 - n]}]})


def down(n: int) -> Exception:
    return EndpointError("no LLM endpoint answered", retryable=True)


async def initialise(chat: ScriptedChat, desk: Desk, count: int, settings: AgentSettings = EDITS) -> int:
    return await Initializer(chat, settings).propose(VIEW, count, desk.submit)


async def test_a_good_reply_becomes_a_candidate_of_the_llm() -> None:
    chat, desk = ScriptedChat(profile), Desk()
    assert await initialise(chat, desk, 3) == 3
    assert desk.sources() == ["llm"] * 3
    provenance = next(iter(desk.accepted.values()))
    assert (provenance.agent, provenance.round, provenance.endpoint) == ("initializer", 1, "scripted")
    assert provenance.prompt and provenance.prompt.startswith("initializer_edits:")


async def test_every_question_has_the_temperature_of_the_settings() -> None:
    chat = ScriptedChat(lambda n: "As you wish." if n == 0 else profile(n))
    await initialise(chat, Desk(), 2, AgentSettings(reply="edits", temperature=0.7))
    assert [question.temperature for question in chat.questions] == [0.7] * 3


async def test_nothing_is_asked_for_no_candidates() -> None:
    chat, desk = ScriptedChat(profile), Desk()
    assert await initialise(chat, desk, 0) == 0
    assert await initialise(chat, desk, 0, LISTS) == 0
    assert chat.conversations == []


async def test_a_bad_reply_is_answered_in_the_same_conversation() -> None:
    chat, desk = ScriptedChat(lambda n: "As you wish." if n == 0 else profile(n)), Desk()
    assert await initialise(chat, desk, 1) == 1
    assert desk.sources() == ["llm"]
    again = chat.conversations[1]
    assert [m["role"] for m in again] == ["system", "user", "assistant", "user"]
    assert again[2]["content"] == "As you wish." and "no JSON" in again[3]["content"]


async def test_the_fallback_proposes_after_two_reasks() -> None:
    chat, desk = ScriptedChat(lambda n: "no"), Desk()
    assert await initialise(chat, desk, 1) == 1
    assert len(chat.conversations) == 3
    assert desk.sources() == ["fallback"]


async def test_the_fallback_proposes_at_once_when_no_endpoint_answers() -> None:
    for agent in (Mutator, Crossover):
        chat, desk = ScriptedChat(down), Desk()
        assert await agent(chat, EDITS).propose(VIEW, MEMBERS, 4, desk.submit) == 4
        assert len(chat.conversations) == 4
        assert desk.sources() == ["fallback"] * 4
        assert all(p.parents and p.endpoint is None for p in desk.accepted.values())


async def test_a_duplicate_is_reported_and_asked_again() -> None:
    chat, desk = ScriptedChat(lambda n: profile(min(n, 1))), Desk()
    await initialise(chat, desk, 1)
    chat = ScriptedChat(lambda n: profile(n))  # its first profile is the one known
    assert await initialise(chat, desk, 1) == 1
    assert "exactly as an earlier configuration" in chat.conversations[1][-1]["content"]
    assert desk.sources() == ["llm", "llm"]


async def test_the_good_part_of_a_reply_is_kept_and_the_rest_asked_for() -> None:
    first = json.dumps([[0.1, 0.2, 0.4, 0.5], [0.1, 0.2, 0.9]])
    chat, desk = ScriptedChat(lambda n: first if n == 0 else "[0.2, 0.2, 0.3, 0.5]"), Desk()
    assert await initialise(chat, desk, 2, LISTS) == 2
    assert desk.sources() == ["llm", "llm"] and desk.refused == 0
    assert "has 3 numbers instead of 4" in chat.conversations[1][-1]["content"]
    assert "1 new one " in chat.conversations[1][-1]["content"]


async def test_calls_run_at_the_same_time_each_with_its_own_seed() -> None:
    everyone_asked = asyncio.Barrier(5)

    class Meeting(ScriptedChat):
        async def ask(self, question: Question) -> Answer:
            answer = await super().ask(question)
            await everyone_asked.wait()  # no call goes on before all have been asked
            return answer

    chat, desk = Meeting(profile), Desk()
    assert await initialise(chat, desk, 5) == 5
    assert len({question.seed for question in chat.questions}) == 5


async def test_the_same_search_asks_with_the_same_seeds() -> None:
    seeds = []
    for _ in range(2):
        chat = ScriptedChat(profile)
        await initialise(chat, Desk(), 4)
        seeds.append([question.seed for question in chat.questions])
    assert seeds[0] == seeds[1]


async def test_agents_stop_quietly_when_the_budget_is_used_up() -> None:
    chat, desk = ScriptedChat(profile), Desk(room=2)
    assert await initialise(chat, desk, 5) == 2
    assert len(chat.conversations) == 5 and desk.refused == 3


async def test_the_fallback_gives_up_where_nothing_new_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, desk = ScriptedChat(down), Desk()
    desk.accepted["0" * 16] = Provenance(agent="baseline", source="allocation", round=0)
    monkeypatch.setattr("tests.agents.test_agents.candidate_id", lambda *_: "0" * 16)  # all are that one
    assert await initialise(chat, desk, 2) == 0
    assert 0 < desk.refused < 1000


async def test_a_refused_item_is_named_by_its_number_in_the_reply() -> None:
    """Even if the items before it could not be parsed."""
    both = json.dumps({"configurations": [[0.1], [0.3] * 4]})
    chat, desk = ScriptedChat(lambda n: both), Desk()
    desk.accepted[candidate_id(SPEC.uniform_plan(SHAPE), SPEC.fingerprint)] = Provenance(
        agent="baseline", source="allocation", round=0
    )
    settings = AgentSettings(reply="lists", reasks=1)
    await Initializer(chat, settings).propose(View(SPEC, PROFILE, 0, ()), 1, desk.submit)
    again = chat.conversations[1][-1]["content"]
    assert "Configuration 1 has 1 numbers instead of 4." in again
    assert "Configuration 2: it prunes the model exactly" in again


async def test_text_that_cannot_be_encoded_is_not_sent_back() -> None:
    chat, desk = ScriptedChat(lambda n: "\ud800 no" if n == 0 else profile(n)), Desk()
    await initialise(chat, desk, 1)
    assert desk.sources() == ["llm"]


async def test_a_reply_that_is_cut_off_is_given_more_room() -> None:
    """Only its beginning is shown again."""
    chat = ScriptedChat(lambda n: "[0.1, " + "0.1, " * 1000)
    chat.finish_reason = "length"
    await initialise(chat, Desk(), 1)
    assert 0 < len(chat.conversations[1][2]["content"]) < 1000
    first, second, third = (question.max_tokens for question in chat.questions)
    assert first < second < third <= EDITS.max_tokens


async def test_mutator_and_crossover_name_the_parents_of_their_offspring() -> None:
    mutation = '{"parent": 1, "changes": [{"first": 0, "last": 1, "points": 10}]}'
    mix = '{"parents": "1+2", "first": 0, "layers": 2}'
    ids = {member.candidate.id for member in MEMBERS}
    for agent, reply, parents in ((Mutator, mutation, 1), (Crossover, mix, 2)):
        chat, desk = ScriptedChat([reply].__getitem__), Desk()
        assert await agent(chat, EDITS).propose(VIEW, MEMBERS, 1, desk.submit) == 1
        (provenance,) = desk.accepted.values()
        assert len(provenance.parents) == parents and ids.issuperset(provenance.parents)


async def test_one_parent_has_no_crossover_and_no_parents_no_mutation() -> None:
    chat, desk = ScriptedChat(profile), Desk()
    assert await Crossover(chat, EDITS).propose(VIEW, MEMBERS[:1], 3, desk.submit) == 0
    assert await Mutator(chat, EDITS).propose(VIEW, (), 3, desk.submit) == 0
    assert chat.conversations == []


@pytest.mark.parametrize(("share", "fewest", "most"), [(0.3, 3, 15), (0.7, 15, 27), (1.0, 30, 30)])
async def test_the_llm_is_asked_for_its_share_of_the_offspring(
    share: float, fewest: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate is made, by the LLM or without it."""
    monkeypatch.setattr("agents.operators.trust_region.GENERATIONS", 2)
    chat, desk = ScriptedChat(down), Desk()
    settings = AgentSettings(reply="moves", share=share)
    assert await Mutator(chat, settings).propose(VIEW, MEMBERS, 30, desk.submit) == 30
    assert fewest <= len(chat.questions) <= most
    assert desk.sources().count("classical") == 30 - len(chat.questions)
    assert await Initializer(chat, settings).propose(View(SPEC, PROFILE, 0, ()), 5, desk.submit) == 5
    assert desk.sources().count("classical") == 30 - (len(chat.questions) - 5), "the Initializer always asks"


async def test_the_share_of_the_llm_does_not_decide_which_parent_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the moves start from the best member, by the LLM or without it."""
    monkeypatch.setattr("agents.operators.trust_region.GENERATIONS", 1)  # the parent is chosen before the plan
    best = MEMBERS[0].candidate.id
    settings = AgentSettings(reply="moves", share=0.3)
    by_source: dict[str, list[bool]] = {"llm": [], "classical": []}
    for round_ in range(1, 41):
        move = json.dumps({"proposals": [{"moves": [1, 2]}]})
        chat, desk = ScriptedChat(lambda n: move), Desk()  # noqa: B023
        await Mutator(chat, settings).propose(replace(VIEW, round=round_), MEMBERS, 5, desk.submit)
        for provenance in desk.accepted.values():
            if provenance.source in by_source:
                by_source[provenance.source].append(provenance.parents == (best,))
    for source, starts in by_source.items():
        assert 0.5 < sum(starts) / len(starts) < 0.85, source


async def test_drafts_are_answered_with_what_is_predicted_of_them() -> None:
    drafts = json.dumps({"proposals": [{"rule": "rate - 0.3*first"}, {"rule": "no"}, {"rule": "rate - 0.1*last"}]})
    final = json.dumps({"proposals": [{"rule": "rate - 0.2*first"}]})
    chat, desk = ScriptedChat([drafts, final].__getitem__), Desk()
    view = replace(VIEW, measured=(RULED, *MEMBERS[1:]), step="rules", population=(RULED, *MEMBERS[1:]))
    settings = AgentSettings(reply="rules", what_if=3)
    assert await Mutator(chat, settings).propose(view, view.population, 1, desk.submit) == 1
    first, second = chat.conversations
    assert "try out 3 different drafts" in first[-1]["content"]
    assert len(second) == 4 and second[2] == {"role": "assistant", "content": drafts}
    predicted = second[3]["content"]
    assert (
        predicted.count("perplexity") == 2
        and "Proposal 1: rate" in predicted
        and "Proposal 3: rate" in predicted
        and "+-" in predicted
    )
    assert desk.sources() == ["llm"] and [str(p.rule)[:7] for p in desk.accepted.values()] == ["rate - "]


@pytest.mark.parametrize("script", [lambda n: "no idea", down])
async def test_without_drafts_the_question_is_asked_as_ever(script: Script) -> None:
    move = json.dumps({"proposals": [{"moves": [1]}]})
    chat, desk = ScriptedChat(lambda n: script(n) if n == 0 else move), Desk()
    settings = AgentSettings(reply="moves", what_if=3)
    assert await Mutator(chat, settings).propose(VIEW, MEMBERS, 1, desk.submit) == 1
    assert desk.sources() == ["llm"] and len(chat.conversations[1]) == 2


@pytest.mark.parametrize("agent", [Mutator, Crossover])
async def test_whole_plans_need_no_llm(agent: type[Mutator] | type[Crossover]) -> None:
    chat, desk = ScriptedChat(down), Desk()
    settings = AgentSettings(reply="rules")
    assert await agent(chat, settings).propose(replace(VIEW, step="plans"), MEMBERS, 3, desk.submit) == 3
    assert not chat.questions and desk.sources() == ["classical"] * 3
    assert {provenance.step for provenance in desk.accepted.values()} == {"plans"}


@pytest.mark.parametrize(("chosen", "step"), [("plans", "plans"), ("mixed", None), ("magic", None), ("rules", None)])
async def test_the_selector_chooses_what_makes_the_offspring(chosen: str, step: str | None) -> None:
    """Only possible steps count, and no rule is measured here."""
    reply = json.dumps({"parents": [4, 2], "step": chosen})
    chat = ScriptedChat(lambda n: reply)
    selection = await Selector(chat, EDITS, chooses_step=True).select(VIEW, 2)
    assert (selection.source, selection.step) == ("llm", step)
    assert "- plans (" in chat.questions[0].messages[-1]["content"]
    assert (await Selector(ScriptedChat(lambda n: reply), EDITS).select(VIEW, 2)).step is None


async def test_the_selector_takes_the_members_that_the_llm_names() -> None:
    selection = await Selector(ScriptedChat(lambda n: '{"parents": [4, 2]}'), EDITS).select(VIEW, 2)
    assert selection.parents == (MEMBERS[1], MEMBERS[3]) and selection.source == "llm"


@pytest.mark.parametrize("script", [down, lambda n: '{"parents": [1, 1]}', lambda n: '{"parents": [9, 12]}'])
async def test_the_fallback_of_the_selector_is_a_tournament(script: Script) -> None:
    selection = await Selector(ScriptedChat(script), EDITS).select(VIEW, 3)
    assert selection.source == "fallback"
    assert len({m.candidate.id for m in selection.parents}) == len(selection.parents) >= 2


async def test_a_selection_has_two_parents_where_the_population_has() -> None:
    for size, expected in ((1, 1), (2, 2), (3, 2)):
        view = View(SPEC, PROFILE, 1, MEMBERS[:size])
        selection = await Selector(ScriptedChat(down), EDITS).select(view, 8)
        assert len(selection.parents) == expected
