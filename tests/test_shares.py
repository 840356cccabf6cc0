"""Endpoints share the questions by what their proposals have improved."""

from collections import Counter
from pathlib import Path

from redis.asyncio import Redis

from agents.chat import Chat
from agents.population import Population
from agents.shares import Offspring, Record, ranked_endpoints, records, records_of
from agents.view import Member, Tried, View
from daemon.summary import summarise
from protocol.candidate import Failed, Provenance
from protocol.keys import Keys
from tests.chatting import QUICK, ask
from tests.samples import CARD, SPEC, candidates, measured
from tests.scripted_llm import ScriptedLlm, refuses, says
from tests.test_proposers import settings
from tests.test_search import Conducted, evaluating


def made_by(endpoint: str | None, fitness: float | None, number: int, parents: tuple[str, ...] = ()) -> Tried:
    who = Provenance(agent="mutator", source="llm", round=1, parents=parents, endpoint=endpoint)
    return Tried(MADE[number].model_copy(update={"provenance": who}), fitness)


MADE = candidates(60)


def view_of(tried: list[Tried]) -> View:
    measured = tuple(Member(t.candidate, t.fitness) for t in tried if t.fitness is not None)
    return View(SPEC, CARD, 9, measured[:5], {}, measured, tuple(tried))


def test_offspring_improve_where_they_are_better_than_the_best_of_their_parents() -> None:
    first, second = MADE[0], MADE[1]
    parents, fitness = (first.id, second.id), {first.id: 20.0, second.id: 30.0}
    tried = [made_by("a", 19.0, 2, parents), made_by("a", 25.0, 3, parents), made_by("a", None, 4, parents)]
    assert records(tried, fitness) == {"a": Record(tried=3, improved=1)}


def test_a_population_that_grows_is_counted_on_from_where_it_was() -> None:
    population, counted = Population(), Offspring()
    for number in range(30):
        parents = (MADE[number - 1].id, MADE[max(0, number - 5)].id) if number else ()
        endpoint = "ab"[number % 2]
        candidate = made_by(endpoint, None, number, parents).candidate
        failed = number % 7 == 3
        population.insert(candidate, Failed(reason="timeout") if failed else measured(20 + (number * 11) % 17))
        if number % 4 == 0:
            counted.take(population)
    counted.take(population)
    counted.take(population)
    assert counted.records == records_of(population) and 0 < counted.records["a"].improved < counted.records["a"].tried


def test_what_has_no_parents_says_nothing_of_its_endpoint() -> None:
    assert records([made_by("a", 1.0, 0), made_by("b", 9.0, 1)], {}) == {}


def test_who_improves_more_is_asked_more_often_and_nobody_is_forgotten() -> None:
    """Also where the poor one's offspring lose their races and are never measured whole."""
    parent = made_by(None, 20.0, 0)
    tried = [parent]
    for i in range(1, 41):
        is_good = i % 2 == 1
        fitness = 19.0 if i % 4 == 1 else 21.0 if is_good else None
        tried.append(made_by("good" if is_good else "poor", fitness, i, (parent.candidate.id,)))
    view = view_of(tried)
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
    offspring = [c for c in search.ledger.values() if c.provenance.endpoint and c.provenance.parents]
    assert record.tried == len(offspring)
    assert 0 < record.improved < record.tried
