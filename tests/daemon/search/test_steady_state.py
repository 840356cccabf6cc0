"""The steady state: a question for each outcome, never more under way than allowed, and nothing lost on the way."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from agents.llm.endpoint import Answer, Question
from daemon.search.modes import rounds_of
from daemon.search.search import Search
from protocol.plans.candidate import Measured
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from tests.daemon.search.test_make_agents import settings
from tests.support.conducted import Conducted, evaluating, killed_until_it_ends, unevenness
from tests.support.schema_answers import SchemaChat

pytestmark = pytest.mark.one_server

STEADY = {"mode": "steady-state", "population": 4, "max_in_flight": 3, "max_evaluations": 24, "rounds": 10}


@asynccontextmanager
async def slow_workers(redis: Redis, keys: Keys, count: int) -> AsyncIterator[None]:
    """Workers that give way now and then, so that outcomes come in any order."""

    async def work(number: int) -> None:
        jobs = JobQueue(redis, keys, f"w{number}", lease_seconds=30)
        while True:
            if job := await jobs.claim():
                await asyncio.sleep(0.002 * (int(job.candidate.id, 16) % 5))
                await jobs.commit(job, unevenness(job.candidate))

    tasks = [asyncio.create_task(work(i)) for i in range(count)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def watched(search: Search, most: list[int]) -> None:
    """Note how many candidates of a turn are ever under way."""
    while True:
        if search.round > 0:
            most.append(search.keeper.waiting)
        await asyncio.sleep(0)


async def test_each_outcome_brings_the_next_question_and_the_budget_is_kept(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    conducted = Conducted(redis, keys, tmp_path, settings=settings(**STEADY))
    search, most = await conducted.open(), [0]
    async with slow_workers(redis, keys, 2), asyncio.timeout(60):
        watching = asyncio.create_task(watched(search, most))
        await search.run(rounds_of(search.settings))
        watching.cancel()
    conducted.journal.close()
    assert search.budget.proposed == len(search.state.population) == 24
    assert 1 < max(most) <= 4  # the first population may still be measured when the turns begin
    turns = Counter(c.provenance.round for c in search.state.ledger.values() if c.provenance.round)
    assert set(turns.values()) == {1} and len(turns) == 20
    assert set(search.state.proposals.by_agent) == {"initializer", "mutator", "crossover"}


async def test_parents_are_of_the_newest_population(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    """Also those that were measured in the last turns, which a generation would not have known."""
    search = await Conducted(redis, keys, tmp_path, settings=settings(**STEADY, selector="none")).searched()
    late = [candidate for candidate in search.state.ledger.values() if candidate.provenance.round > 10]
    newest = [
        max(search.state.ledger[parent].provenance.round for parent in candidate.provenance.parents)
        for candidate in late
        if candidate.provenance.parents
    ]
    assert median(newest) > 0 and max(newest) > 5


async def test_a_steady_search_killed_anywhere_goes_on_and_measures_nothing_twice(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    search, evaluated, kills = await killed_until_it_ends(
        lambda: Conducted(redis, keys, tmp_path, settings=settings(**STEADY))
    )
    assert kills >= 2
    assert search.budget.proposed == 24 and set(evaluated.values()) == {1}


async def test_a_search_that_finds_nothing_new_ends(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    """Two layers that may hardly differ have few plans."""
    narrow = Conducted(redis, keys, tmp_path, settings=settings(**STEADY, seeds=["uniform"]))
    narrow.spec = narrow.spec.model_copy(update={"lowest_rate": 0.29, "highest_rate": 0.31})
    search = await narrow.searched()
    assert search.budget.proposed < 24
    assert all(isinstance(e.outcome, Measured) for e in search.state.population)


class Dying(SchemaChat):
    async def ask(self, question: Question) -> Answer:
        if question.label.startswith("mutator"):
            raise RuntimeError("nobody expected this")
        return await super().ask(question)


async def test_an_error_in_a_turn_ends_the_search_and_leaves_no_task(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    conducted = Conducted(redis, keys, tmp_path, settings=settings(**STEADY), chat=Dying())
    async with evaluating(redis, keys):
        before = asyncio.all_tasks()
        with pytest.raises(ExceptionGroup):
            await conducted.run()
        assert asyncio.all_tasks() == before


@pytest.mark.parametrize(("limits", "name"), [({"max_evaluations": 8}, "max_evaluations"), ({"rounds": 1}, "rounds")])
async def test_a_finished_search_that_is_started_again_says_which_setting_lengthens_it(
    redis: Redis, keys: Keys, tmp_path: Path, limits: dict[str, int], name: str
) -> None:
    chosen = settings(population=4, mutations=2, crossovers=2, **({"rounds": 10} | limits))
    with capture_logs() as logs:
        first = await Conducted(redis, keys, tmp_path, settings=chosen).searched()
    assert "nothing_left_to_do" not in [line["event"] for line in logs]
    with capture_logs() as logs:
        second = await Conducted(redis, keys, tmp_path, settings=chosen).searched()
    (line,) = [line for line in logs if line["event"] == "nothing_left_to_do"]
    assert line["advice"] == f"search.{name} is {limits[name]}; a larger number lengthens the search"
    assert line["measured"] == first.budget.proposed == second.budget.proposed


def test_the_limit_that_ended_a_search_is_the_one_to_raise() -> None:
    chosen = settings(population=4, mutations=2, crossovers=2, rounds=10, max_evaluations=20)
    timed = chosen.model_copy(update={"budget_hours": 2.0})
    assert chosen.how_to_lengthen(20).startswith("search.max_evaluations is 20;")
    assert timed.how_to_lengthen(20).startswith("search.max_evaluations is 20;")
    assert timed.how_to_lengthen(12).startswith("search.budget_hours is 2.0;")
