"""Races: a candidate that is worse on the first windows is stopped there, and never counts as a whole measurement."""

import json
import math
from pathlib import Path

import pytest
from redis.asyncio import Redis

from daemon.monitor.summary import summarise
from daemon.search.checks import check_windows
from daemon.settings.sources import load
from gpu_worker.evaluation.session import Session
from protocol.errors import DataError, SettingsError
from protocol.plans.candidate import Candidate, Measured, Outcome, Race, Stopped
from protocol.plans.plan import dense_plan
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.queue.keys import Keys
from tests.daemon.search.test_make_agents import settings
from tests.support.conducted import Conducted, evaluating, evaluations
from tests.support.samples import measured
from tests.support.tiny_specs import tiny_spec

pytestmark = pytest.mark.one_server


@pytest.mark.parametrize(
    ("losses", "stopped"),
    [
        ([1.0], False),  # too early to say
        ([1.0, 2.1], True),
        ([1.0, 2.0], False),  # as good
        ([1.2, 1.7], False),  # better in all
        ([1.0, 2.1, 3.0], False),  # it got through
        ([1.0, math.nan], False),
    ],
)
def test_multi_fidelity_looks_once_and_asks_for_no_more_than_worse(losses: list[float], stopped: bool) -> None:
    race = Race(against=(1.0, 2.0, 3.0, 4.0), first_windows=2)
    assert race.is_lost(losses) == stopped
    for too_short in ((), race.against[: len(losses)]):  # nothing to race against, or nothing left to be saved
        assert not race.model_copy(update={"against": too_short}).is_lost(losses)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SearchSpec:
    made = tiny_spec(tmp_path_factory.mktemp("racing"))
    return made.model_copy(update={"fitness": made.fitness.model_copy(update={"windows": 8, "seqlen": 32})})


@pytest.mark.parametrize("measure", ["perplexity", "kl"])
def test_a_worker_measures_the_first_windows_of_the_worse_alone(spec: SearchSpec, measure: str) -> None:
    session = Session(spec.model_copy(update={"measure": measure}), sensitivity=False)
    dense = dense_plan(session.shape)
    whole = session.race(dense, Race(against=(), first_windows=2))
    assert isinstance(whole, Measured) and len(whole.losses) == 8
    assert sum(whole.losses) / 8 == pytest.approx(
        math.log(whole.perplexity) if measure == "perplexity" else whole.kl, abs=1e-4
    )
    better = Race(against=tuple(loss - 1e-3 for loss in whole.losses), first_windows=2)
    stopped = session.race(dense, better)
    assert isinstance(stopped, Stopped) and (stopped.windows, stopped.of_windows) == (2, 8)
    assert stopped.tokens == 2 * 31 and stopped.behind == pytest.approx(1e-3)
    again = session.race(dense, Race(against=whole.losses, first_windows=2))
    assert isinstance(again, Measured) and again.perplexity == whole.perplexity


def racer(candidate: Candidate) -> Outcome:
    """Even candidates are whole, odd ones lose once there is somebody to lose against."""
    race = candidate.race
    whole = measured(10 + int(candidate.id, 16) % 1000 / 100, candidate)
    if race is None or not race.against or int(candidate.id, 16) % 2 == 0:
        return whole.model_copy(update={"losses": (math.log(whole.perplexity),) * 4 if race else ()})
    figures = whole.model_dump(include={"kl", "parameters", "tokens", "seconds"})
    # Better than every whole one, on few windows: it must not be taken for the best.
    return Stopped(perplexity=1.5, behind=0.1, windows=2, of_windows=4, **figures)


async def test_who_was_stopped_is_counted_and_is_no_member(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    chosen = settings(first_windows=2)
    conducted = Conducted(redis, keys, tmp_path, settings=chosen)
    async with evaluating(redis, keys, racer):
        search = await conducted.run()
    stopped = [e for e in search.state.population if isinstance(e.outcome, Stopped)]
    assert stopped and len(search.state.population) == search.budget.proposed - len(stopped)
    best = search.state.population.best()
    assert best is not None and isinstance(best.outcome, Measured) and best.outcome.perplexity >= 10
    assert {e.candidate.provenance.round for e in stopped} <= {1, 2}
    for evaluation in search.state.population:
        candidate = evaluation.candidate
        if candidate.provenance.agent == "baseline":
            continue
        assert candidate.race is not None
        ranked = search.state.population.top(chosen.population, before=candidate.provenance.round)
        last = ranked[-1].outcome if len(ranked) == chosen.population else None
        assert candidate.race.against == (last.losses if isinstance(last, Measured) else ())
    summary = summarise("test", search.state, {}, finished=True)
    assert summary.candidates["by_outcome"]["stopped"] == len(stopped)
    assert sum(e["outcome"]["kind"] == "stopped" for e in evaluations(tmp_path)) == len(stopped)


async def test_evolution_races_against_the_parent_of_all(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    conducted = Conducted(redis, keys, tmp_path, settings=settings(first_windows=2, proposer="evolution"))
    async with evaluating(redis, keys, racer):
        search = await conducted.run()
    for round_ in (1, 2):
        (best,) = search.state.population.top(1, before=round_)
        assert isinstance(best.outcome, Measured)
        raced = [c.race.against for c in search.state.ledger.values() if c.provenance.round == round_ and c.race]
        assert raced and set(raced) == {best.outcome.losses}


async def test_agents_see_who_was_stopped_as_far_behind_as_it_was(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    conducted = Conducted(redis, keys, tmp_path, settings=settings(first_windows=2))
    async with evaluating(redis, keys, racer):
        search = await conducted.run()
    stopped = [tried for tried in search.view(3).recent if tried.stopped]
    assert stopped
    for tried in stopped:
        race = tried.candidate.race
        assert race is not None and tried.fitness == pytest.approx(math.exp(race.against[0] + 0.1), abs=1e-3)
        assert search.view(3).fitness_of(tried.candidate.id) == tried.fitness


@pytest.mark.parametrize("mode", ["generational", "steady-state"])
async def test_a_search_may_be_of_so_many_tokens(redis: Redis, keys: Keys, tmp_path: Path, mode: str) -> None:
    """Each measurement is of 62; the search ends with the round in which they are used up."""
    chosen = settings(max_tokens=7 * 62, mode=mode, max_in_flight=1)
    conducted = Conducted(redis, keys, tmp_path, settings=chosen)
    async with evaluating(redis, keys):
        search = await conducted.run()
    assert search.budget.proposed == {"generational": 10, "steady-state": 7}[mode] < search.settings.planned
    again = Conducted(redis, keys, tmp_path, settings=chosen)
    async with evaluating(redis, keys):
        assert (await again.run()).budget.proposed == search.budget.proposed


async def test_without_first_windows_no_candidate_races(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    async with evaluating(redis, keys, racer):
        search = await Conducted(redis, keys, tmp_path).run()
    assert all(c.race is None for c in search.state.ledger.values())
    assert len(search.state.population) == search.budget.proposed


def test_a_text_with_no_more_windows_than_are_looked_at_first_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("search: {first_windows: 4}\ntarget: {model: m, rate: 0.3}\ndata: {fitness_windows: 4}\n")
    with pytest.raises(SettingsError, match=r"first_windows \(4\) must be fewer than data.fitness_windows \(4\)"):
        load(file, [])
    with pytest.raises(DataError, match=r"first_windows \(4\).*text \(4\)"):
        check_windows(settings(first_windows=4), 4)
    check_windows(settings(first_windows=4), 5)
    check_windows(settings(), 1)


@pytest.mark.parametrize("measure", ["perplexity", "kl"])
def test_answers_of_different_lengths_race_by_all_their_tokens(spec: SearchSpec, tmp_path: Path, measure: str) -> None:
    rows = [{"prompt": f"{i} is", "completion": "abcd " * (1 + 5 * (i % 2))} for i in range(8)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TextSpec(source=str(tmp_path / "tasks.jsonl"), windows=8, seqlen=64)
    session = Session(spec.model_copy(update={"measure": measure, "fitness": text}), sensitivity=False)
    plan = spec.uniform_plan(session.shape)
    whole = session.race(plan, Race(against=(), first_windows=2))
    assert isinstance(whole, Measured) and len(whole.losses) == 8
    assert whole.tokens == sum(len(row["completion"]) + 1 for row in rows)
    wanted = math.log(whole.perplexity) if measure == "perplexity" else whole.kl
    assert wanted and sum(whole.losses) / 8 == pytest.approx(wanted, rel=1e-4)
