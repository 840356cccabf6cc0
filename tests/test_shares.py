"""Endpoints share the questions by what their proposals have improved."""

from collections import Counter
from pathlib import Path

from redis.asyncio import Redis

from agents.chat import Chat
from agents.shares import Record, ranked_endpoints, records
from agents.view import Member, View
from daemon.summary import summarise
from protocol.candidate import Provenance
from protocol.keys import Keys
from tests.chatting import QUICK, ask
from tests.samples import CARD, SPEC, candidates
from tests.scripted_llm import ScriptedLlm, refuses, says
from tests.test_proposers import settings
from tests.test_search import Conducted, evaluating


def made_by(
    endpoint: str | None, fitness: float, number: int, parents: tuple[str, ...] = (), round_: int = 1
) -> Member:
    who = Provenance(agent="mutator", source="llm", round=round_, parents=parents, endpoint=endpoint)
    return Member(MADE[number].model_copy(update={"provenance": who}), fitness)


MADE = candidates(60)


def view_of(members: list[Member]) -> View:
    return View(SPEC, CARD, 9, tuple(members[:5]), {}, tuple(members))


def test_a_proposal_improves_where_it_is_better_than_the_best_of_its_parents() -> None:
    first, second = made_by(None, 20.0, 0), made_by(None, 30.0, 1)
    parents = (first.candidate.id, second.candidate.id)
    found = records([first, second, made_by("a", 19.0, 2, parents), made_by("a", 25.0, 3, parents)])
    assert found == {"a": Record(measured=2, improved=1)}


def test_a_proposal_without_parents_improves_where_it_is_better_than_the_median_of_its_round() -> None:
    members = [
        made_by(name, fitness, i, round_=0) for i, (name, fitness) in enumerate([("a", 1.0), ("b", 5), ("b", 9)])
    ]
    assert records(members) == {"a": Record(1, 1), "b": Record(2, 0)}


def test_who_improves_more_is_asked_more_often_and_nobody_is_forgotten() -> None:
    parent = made_by(None, 20.0, 0)
    members = [parent]
    for i in range(1, 41):
        good = i % 2
        fitness = 19.0 if good and i % 4 == 1 else 21.0
        members.append(made_by("good" if good else "poor", fitness, i, (parent.candidate.id,)))
    view = view_of(members)
    first = Counter(ranked_endpoints(view, ("poor", "good", "new"), seed)[0] for seed in range(400))
    assert first["good"] > 5 * max(1, first["poor"])
    assert first["new"] > 40  # what is not known may be good
    assert ranked_endpoints(view, ("poor", "good"), 7) == ranked_endpoints(view, ("poor", "good"), 7)


def test_at_first_all_are_asked_alike() -> None:
    view = view_of([])
    first = Counter(ranked_endpoints(view, ("a", "b", "c"), seed)[0] for seed in range(600))
    assert all(150 < first[name] < 250 for name in "abc")


async def test_the_preferred_endpoint_is_asked_first_and_the_others_when_it_fails() -> None:
    async with (
        ScriptedLlm([says("one")], name="one") as one,
        ScriptedLlm([says("two"), refuses(500, "broken")], name="two") as two,
        Chat([one.endpoint, two.endpoint], QUICK) as chat,
    ):
        said = [(await ask(chat, prefer=prefer)).text for prefer in ((), ("two",), ("two", "one"))]
    assert said == ["one", "two", "one"]


async def test_the_summary_says_what_each_endpoint_came_to(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    async with evaluating(redis, keys):
        search = await Conducted(redis, keys, tmp_path, settings=settings()).run()
    summary = summarise("test", SPEC, CARD, search.ledger, search.population, {}, finished=True)
    (record,) = summary.endpoints.values()
    assert record.measured == summary.candidates["by_source"]["llm"]
    assert 0 < record.improved < record.measured
