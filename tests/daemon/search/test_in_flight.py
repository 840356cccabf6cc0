"""How many candidates a steady state has under way: by what it sees, or as the user says."""

import asyncio
from pathlib import Path
from random import Random

import pytest
from redis.asyncio import Redis

from agents.llm.endpoint import Answer, Question
from agents.population.population import Population
from benchmarks.pipeline.case import Case
from benchmarks.pipeline.simulate import Simulation
from daemon.search.in_flight import MOST, InFlight
from daemon.search.modes import rounds_of
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from tests.daemon.search.test_make_agents import settings
from tests.support.conducted import Conducted, unevenness
from tests.support.samples import candidate, measured
from tests.support.schema_answers import SchemaChat


def after(seconds: float) -> Population:
    """A population whose candidates took this long."""
    population = Population()
    for i in range(3):
        one = candidate((0.1 * i,) * 4)
        population.insert(one, measured(10.0, one).model_copy(update={"seconds": seconds}))
    return population


async def workers() -> int:
    return 4


async def no_worker() -> int:
    return 0


@pytest.mark.parametrize(
    ("evaluation", "answers", "limit"),
    [
        (7.0, [], 8),  # nothing is known of the LLM
        (7.0, [0.1], 9),
        (7.0, [7.0], 12),
        (7.0, [28.0], 24),
        (7.0, [28.0, 28.0, 300.0], 24),  # one slow answer does not count
        (7.0, [1e9], MOST),
        (0.0, [1.0], MOST),
    ],
)
async def test_as_many_are_under_way_as_keep_the_workers_busy(
    evaluation: float, answers: list[float], limit: int
) -> None:
    in_flight = InFlight(None, after(evaluation), workers)
    for seconds in answers:
        in_flight.answered(seconds)
    assert await in_flight.limit() == limit


async def test_only_the_newest_answers_count() -> None:
    in_flight = InFlight(None, after(1.0), workers)
    for seconds in [100.0] * 20 + [1.0] * 8:
        in_flight.answered(seconds)
    assert await in_flight.limit() == 12


async def test_without_a_worker_that_is_ready_one_is_expected() -> None:
    assert await InFlight(None, Population(), no_worker).limit() == 2


async def test_a_users_number_stays() -> None:
    in_flight = InFlight(3, after(1.0), workers)
    in_flight.answered(100.0)
    assert await in_flight.limit() == 3


class Slow(SchemaChat):
    async def ask(self, question: Question) -> Answer:
        await asyncio.sleep(0.4)
        return await super().ask(question)


@pytest.mark.one_server
async def test_a_search_asks_for_more_if_answers_are_slow(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    chosen = settings(mode="steady-state", population=4, max_evaluations=30, rounds=30)
    search = await Conducted(redis, keys, tmp_path, settings=chosen, chat=Slow()).open()
    most = 0

    async def work() -> None:
        nonlocal most
        jobs = JobQueue(redis, keys, "w", lease_seconds=30)
        while True:
            if job := await jobs.claim():
                await asyncio.sleep(0.1)
                most = max(most, await search.in_flight.limit())
                await jobs.commit(job, unevenness(job.candidate).model_copy(update={"seconds": 0.1}))

    working = asyncio.create_task(work())
    async with asyncio.timeout(60):
        await search.run(rounds_of(search.settings))
    working.cancel()
    assert most >= 6, "1 · (1 + 4) and one more; at first it was 2"


@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.0])
def test_workers_are_busy_in_a_steady_state_when_an_answer_takes_as_long_as_four_evaluations(ratio: float) -> None:
    case = Case(workers=8, evaluation=7.0, answer=7.0 * ratio, mode="steady-state", candidates=2000)
    assert Simulation(case, Random(0).randrange(100)).busy_share > 0.95
