"""How many candidates a steady state has under way: by what it sees, or as the user says."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from redis.asyncio import Redis

from agents.llm.endpoint import Answer, Question
from agents.population.population import Population
from benchmarks.pipeline.case import Case
from benchmarks.pipeline.simulate import Simulation
from daemon.search.in_flight import MOST_TOGETHER, InFlight
from daemon.search.modes import rounds_of
from protocol.plans.candidate import Failed, Stopped
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from tests.daemon.search.test_make_agents import settings
from tests.support.conducted import Conducted, unevenness
from tests.support.samples import candidates, measured
from tests.support.schema_answers import SchemaChat


def after(*seconds: float) -> Population:
    """A population whose candidates took this long."""
    population = Population()
    for one, took in zip(candidates(len(seconds)), seconds, strict=True):
        population.insert(one, measured(10.0, one).model_copy(update={"seconds": took}))
    assert population.outcomes == len(seconds)
    return population


async def workers() -> int:
    return 4


async def no_worker() -> int:
    return 0


def in_flight(population: Population, *answers: float, fixed: int | None = None, at_once: int = 16) -> InFlight:
    made = InFlight(fixed, population, workers, at_once)
    for seconds in answers:
        made.answered(seconds)
    return made


@pytest.mark.parametrize(
    ("answers", "limit"),
    [
        ([], 8),  # nothing is known of the LLM
        ([0.1], 9),
        ([7.0], 12),
        ([14.0], 16),
        ([14.0, 14.0, 300.0], 16),  # one slow answer does not count
        ([1e9], 8 + 16),  # more questions would only wait for each other
    ],
)
async def test_as_many_are_under_way_as_keep_the_workers_busy(answers: list[float], limit: int) -> None:
    assert (await in_flight(after(7.0, 1.0, 7.0, 70.0, 7.0), *answers).room()).candidates == limit


async def test_only_the_newest_answers_count() -> None:
    assert (await in_flight(after(1.0), *[100.0] * 20, *[1.0] * 8).room()).candidates == 12


async def test_candidates_that_lost_their_race_count_with_the_little_time_they_took() -> None:
    population = after(7.0)
    made = in_flight(population, 2.0)
    assert (await made.room()).candidates == 10
    one = candidates(2)[1]
    figures = measured(10.0, one).model_dump(include={"perplexity", "kl", "parameters", "tokens"})
    population.insert(one, Stopped(seconds=1.0, behind=0.1, windows=1, of_windows=8, **figures))
    assert (await made.room()).candidates == 10, "the median of 7 and 1 is 4: 4 · 2 / 4 of them are asked for"


async def test_the_time_of_an_evaluation_is_remembered_when_the_newest_failed() -> None:
    population = after(1.0)
    made = in_flight(population, 2.0)
    assert (await made.room()).candidates == 16
    for one in candidates(9)[1:]:
        population.insert(one, Failed(reason="not-finite", detail=""))
    assert (await made.room()).candidates == 16


async def test_without_a_worker_that_is_ready_one_is_expected() -> None:
    assert (await InFlight(None, Population(), no_worker, 4).room()).candidates == 2


async def test_a_users_number_stays() -> None:
    assert (await in_flight(after(1.0), 100.0, fixed=3).room()).candidates == 3


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
                most = max(most, (await search.in_flight.room()).candidates)
                await jobs.commit(job, unevenness(job.candidate).model_copy(update={"seconds": 0.1}))

    working = asyncio.create_task(work())
    async with asyncio.timeout(60):
        await search.run(rounds_of(search.settings))
    working.cancel()
    assert most >= 6, "1 · (1 + 4) and one more; at first it was 2"


@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.0])
def test_workers_are_busy_in_a_steady_state_if_the_endpoint_answers_enough_at_once(ratio: float) -> None:
    case = Case(workers=8, evaluation=7.0, answer=7.0 * ratio, mode="steady-state", candidates=5000, at_once=40)
    assert Simulation(case).busy_share > 0.95


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_slow_endpoint_is_asked_for_several_candidates_at_once(workers: int) -> None:
    case = Case(workers, evaluation=7.0, answer=28.0, mode="steady-state", candidates=2000, at_once=4)
    assert case.together > 1
    assert Simulation(case).busy_share > 0.95


def test_an_endpoint_that_answers_far_too_few_is_the_limit() -> None:
    case = Case(workers=64, evaluation=7.0, answer=28.0, mode="steady-state", candidates=4000, at_once=4)
    assert Simulation(case).busy_share == pytest.approx(4 * MOST_TOGETHER / 28 / (64 / 7), rel=0.15)


async def after_answers(made: InFlight, once: float, each: float, questions: int) -> list[int]:
    """How many candidates each of the next questions asks for, if an answer takes `once` and `each` for a candidate."""
    found = []
    for _ in range(questions):
        found.append((await made.room()).together)
        made.answered(once + each * found[-1], found[-1])
    return found


async def test_one_question_asks_for_as_many_as_the_workers_need() -> None:
    asked = await after_answers(in_flight(after(7.0), at_once=4), 60.0, 1.0, 40)
    assert asked[:3] == [1, 1, 1] and set(asked[-20:]) == {8}, "4 workers take four in 7 seconds"
    asked = await after_answers(in_flight(after(7.0), at_once=8), 20.0, 1.0, 40)
    assert set(asked[-20:]) == {2}


async def test_answers_that_grow_with_the_number_of_candidates_are_not_asked_for_more() -> None:
    assert set((await after_answers(in_flight(after(7.0), at_once=4), 0.0, 20.0, 60))[10:]) == {1}


async def test_an_endpoint_that_was_slow_for_a_while_is_asked_for_one_candidate_again() -> None:
    made = in_flight(after(7.0), at_once=4)
    assert max(await after_answers(made, 600.0, 0.0, 10)) == 8
    assert set((await after_answers(made, 1.0, 0.1, 60))[-20:]) == {1}


async def test_one_question_asks_for_one_candidate_if_the_user_says_so() -> None:
    population = after(1.0)
    for made in (in_flight(population, fixed=9), InFlight(None, population, workers, 4, most_together=1)):
        assert set(await after_answers(made, 100.0, 0.0, 10)) == {1}


class Counted(SchemaChat):
    """Answers slowly, and keeps the labels of the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[str] = []

    async def ask(self, question: Question) -> Answer:
        self.labels.append(question.label)
        await asyncio.sleep(0.4)
        return await super().ask(question)


@pytest.mark.one_server
async def test_a_slow_llm_is_asked_for_several_candidates_in_one_question(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    chosen, chat = settings(mode="steady-state", population=4, max_evaluations=60, rounds=60), Counted()
    search = await Conducted(redis, keys, tmp_path, settings=chosen, chat=chat).open()

    async def work() -> None:
        jobs = JobQueue(redis, keys, "w", lease_seconds=30)
        while True:
            if job := await jobs.claim():
                await asyncio.sleep(0.02)
                await jobs.commit(job, unevenness(job.candidate).model_copy(update={"seconds": 0.02}))

    working = asyncio.create_task(work())
    async with asyncio.timeout(60):
        await search.run(rounds_of(search.settings))
    working.cancel()
    assert search.state.population.outcomes >= 60
    calls = Counter((each.provenance.round, each.provenance.agent) for each in search.state.ledger.values())
    assert max(count for (round_, _), count in calls.items() if round_) > 2
    selections = [label for label in chat.labels if label.startswith("selector")]
    assert len(selections) >= 3, "parents are selected for about as many candidates as are under way"
