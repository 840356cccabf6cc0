"""Racing: who is clearly worse is stopped, who is as good almost never, and nobody counts as whole who is not."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from daemon.checks import check_race
from daemon.setting_sources import load
from daemon.summary import summarise
from gpu_worker.racing import is_beaten, is_clearly_worse
from gpu_worker.session import Session
from protocol.candidate import LEAST_RACE, Candidate, Measured, Outcome, Race, Stopped
from protocol.errors import DataError, SettingsError
from protocol.keys import Keys
from protocol.plan import dense_plan
from protocol.spec import SearchSpec
from tests.samples import CARD, SPEC, measured
from tests.test_proposers import settings
from tests.test_search import Conducted, evaluating, evaluations
from tests.tiny_specs import tiny_spec

CONFIDENCE = 0.95


def first_stop(losses: list[float], against: list[float], confidence: float = CONFIDENCE) -> int | None:
    """After how many windows the candidate is stopped."""
    return next((n for n in range(1, len(losses)) if is_clearly_worse(losses[:n], against, confidence)), None)


def test_a_candidate_that_is_as_good_is_stopped_no_more_often_than_the_confidence_allows() -> None:
    rng, stops, races = random.Random(0), 0, 2000
    for _ in range(races):
        against = [rng.gauss(3.5, 0.5) for _ in range(8)]
        losses = [loss + rng.gauss(0, 0.02) for loss in against]
        stops += first_stop(losses, against) is not None
    assert stops / races < 1 - CONFIDENCE
    assert stops > 0  # the test can fail


def test_a_candidate_that_is_clearly_worse_is_stopped_early() -> None:
    rng = random.Random(0)
    found = []
    for _ in range(200):
        against = [rng.gauss(3.5, 0.5) for _ in range(16)]
        losses = [loss + rng.gauss(0.2, 0.03) for loss in against]
        found.append(first_stop(losses, against))
    assert sum(stop is not None and stop <= 5 for stop in found) > 180


def test_pairing_tells_what_the_means_alone_do_not() -> None:
    """Windows differ by far more than candidates; on the same windows a small difference is seen."""
    against = [2.0, 3.0, 4.0, 5.0, 2.5, 3.5, 4.5, 5.5]
    assert first_stop([loss + 0.05 + 0.001 * (i % 2) for i, loss in enumerate(against)], against) is not None
    assert first_stop(sorted(against), against) is None


@pytest.mark.parametrize(
    ("losses", "against"),
    [
        ([9.0, 9.0], [1.0] * 8),  # too few windows
        ([9.0] * 8, [1.0] * 8),  # all are measured already
        ([9.0] * 4, []),  # nothing to race against
        ([0.5] * 4, [1.0] * 8),  # better
        ([math.nan] * 4, [1.0] * 8),
    ],
)
def test_nobody_is_stopped_without_a_reason(losses: list[float], against: list[float]) -> None:
    assert not is_beaten(losses, Race(against=tuple(against), confidence=CONFIDENCE))


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
    assert is_beaten(losses, race) == stopped
    assert not is_beaten(losses, race.model_copy(update={"against": ()}))


def test_a_worker_measures_the_first_windows_of_the_worse_alone(spec: SearchSpec) -> None:
    session = Session(spec, sensitivity=False)
    plan = dense_plan(session.shape)
    whole = session.race(plan, Race(against=(), first_windows=2))
    assert isinstance(whole, Measured) and len(whole.losses) == 8
    better = Race(against=tuple(loss - 1e-3 for loss in whole.losses), first_windows=2)
    stopped = session.race(plan, better)
    assert isinstance(stopped, Stopped) and stopped.windows == 2 and stopped.tokens == 2 * 31
    assert isinstance(session.race(plan, Race(against=whole.losses, first_windows=2)), Measured)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> SearchSpec:
    made = tiny_spec(tmp_path_factory.mktemp("racing"))
    return made.model_copy(update={"fitness": made.fitness.model_copy(update={"windows": 8, "seqlen": 32})})


@pytest.mark.parametrize("measure", ["perplexity", "kl"])
def test_a_worker_stops_the_loser_and_says_so(spec: SearchSpec, measure: str) -> None:
    session = Session(spec.model_copy(update={"measure": measure}), sensitivity=False)
    dense = dense_plan(session.shape)
    whole = session.race(dense, Race(against=(), confidence=CONFIDENCE))
    assert isinstance(whole, Measured) and len(whole.losses) == 8
    assert sum(whole.losses) / 8 == pytest.approx(
        math.log(whole.perplexity) if measure == "perplexity" else whole.kl, abs=1e-4
    )
    # What it races against is better than anything can be.
    ahead = Race(against=tuple(loss - 1 - 0.01 * i for i, loss in enumerate(whole.losses)), confidence=CONFIDENCE)
    stopped = session.race(dense, ahead)
    assert isinstance(stopped, Stopped)
    assert LEAST_RACE <= stopped.windows < stopped.of_windows == 8
    assert stopped.tokens == stopped.windows * 31 and stopped.behind > 1
    behind = Race(against=tuple(loss + 1 for loss in whole.losses), confidence=CONFIDENCE)
    again = session.race(dense, behind)
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


@pytest.mark.parametrize("how", [{"race_confidence": CONFIDENCE}, {"first_windows": 2}])
async def test_who_was_stopped_is_counted_and_is_no_member(
    redis: Redis, keys: Keys, tmp_path: Path, how: dict[str, Any]
) -> None:
    chosen = settings(**how)
    conducted = Conducted(redis, keys, tmp_path, settings=chosen)
    async with evaluating(redis, keys, racer):
        search = await conducted.run()
    stopped = [e for e in search.population if isinstance(e.outcome, Stopped)]
    assert stopped and len(search.population) == search.proposed - len(stopped)
    best = search.population.best()
    assert best is not None and isinstance(best.outcome, Measured) and best.outcome.perplexity >= 10
    assert {e.candidate.provenance.round for e in stopped} <= {1, 2}
    for evaluation in search.population:
        candidate = evaluation.candidate
        if candidate.provenance.agent == "baseline":
            continue
        assert candidate.race is not None
        ranked = search.population.top(chosen.population, before=candidate.provenance.round)
        last = ranked[-1].outcome if len(ranked) == chosen.population else None
        assert candidate.race.against == (last.losses if isinstance(last, Measured) else ())
    summary = summarise("test", SPEC, CARD, search.ledger, search.population, {}, finished=True)
    assert summary.candidates["by_outcome"]["stopped"] == len(stopped)
    assert sum(e["outcome"]["kind"] == "stopped" for e in evaluations(tmp_path)) == len(stopped)


async def test_evolution_races_against_the_parent_of_all(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    conducted = Conducted(redis, keys, tmp_path, settings=settings(first_windows=2, proposer="evolution"))
    async with evaluating(redis, keys, racer):
        search = await conducted.run()
    for round_ in (1, 2):
        (best,) = search.population.top(1, before=round_)
        assert isinstance(best.outcome, Measured)
        raced = [c.race.against for c in search.ledger.values() if c.provenance.round == round_ and c.race]
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
    assert search.proposed == {"generational": 10, "steady-state": 7}[mode] < search.planned
    again = Conducted(redis, keys, tmp_path, settings=chosen)
    async with evaluating(redis, keys):
        assert (await again.run()).proposed == search.proposed


async def test_without_racing_nobody_races(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    async with evaluating(redis, keys, racer):
        search = await Conducted(redis, keys, tmp_path).run()
    assert all(c.race is None for c in search.ledger.values())
    assert len(search.population) == search.proposed


def test_a_text_too_short_to_race_on_is_refused(tmp_path: Path) -> None:
    wrong = {
        "search.race_confidence": "0.9",
        "data.fitness_windows": str(LEAST_RACE),
        "target.model": "m",
        "target.rate": "0.3",
    }
    file = tmp_path / "search.yaml"
    file.write_text("{}")
    with pytest.raises(SettingsError, match=r"race_confidence.*at least 4 windows.*data.fitness_windows is 3"):
        load(file, [f"{name}={value}" for name, value in wrong.items()])
    with pytest.raises(DataError, match=r"at least 4 windows.*has 2"):
        check_race(0.9, None, 2)
    check_race(0.9, None, LEAST_RACE + 1)
    check_race(None, None, 1)
    check_race(None, None, 0)


def test_a_text_with_no_more_windows_than_are_looked_at_first_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("search: {first_windows: 4}\ntarget: {model: m, rate: 0.3}\ndata: {fitness_windows: 4}\n")
    with pytest.raises(SettingsError, match=r"first_windows \(4\) must be fewer than data.fitness_windows \(4\)"):
        load(file, [])
    with pytest.raises(DataError, match=r"first_windows \(4\).*which has 4"):
        check_race(None, 4, 4)
    check_race(None, 4, 5)
