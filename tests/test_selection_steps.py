"""Selection in steps: siblings are tried on a few windows, the best of them on more, and few are measured whole."""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis
from rich.console import Console

from agents.population import Population
from daemon.changes import Follower
from daemon.checks import check_windows
from daemon.history import History
from daemon.journal import Journal
from daemon.recovery import recovered
from daemon.search import Search
from daemon.setting_sources import load
from daemon.settings import SearchSettings
from daemon.status import Around, Condition, QueueDepth, Seen, Tally
from daemon.summary import show, summarise
from gpu_worker.answering import answer
from gpu_worker.session import Session
from protocol.candidate import Candidate, Failed, Measured, Outcome, Race, Sampled, candidate_id
from protocol.errors import DataError, SettingsError
from protocol.keys import Keys
from protocol.plan import dense_plan
from tests.samples import CARD, SPEC, candidates, measured
from tests.test_proposers import settings
from tests.test_search import Conducted, evaluating, evaluations, killed_with, unevenness
from tests.tiny_specs import tiny_spec

WINDOWS = 8
STEPS = [{"offspring": 12, "windows": 1}, {"offspring": 4, "windows": 3}]
WHOLE = 2
"""Offspring of a round that are measured on all windows."""


def chosen(**update: Any) -> SearchSettings:
    of_evolution = {"proposer": "evolution", "mutations": WHOLE, "crossovers": 0, "selection_steps": STEPS}
    return settings(**{**of_evolution, "rounds": 3, **update})


def on_windows(candidate: Candidate) -> Outcome:
    """As `unevenness`, but a window may like another candidate; parts look better than any whole."""
    whole = unevenness(candidate)
    assert isinstance(whole, Measured)
    if candidate.on_windows is None:
        return whole
    luck = math.fsum(int(candidate.id, 16) % (window + 7) / 10 for window in candidate.on_windows)
    figures = whole.model_dump(include={"parameters", "seconds"})
    tokens = 31 * len(candidate.on_windows)
    return Sampled(perplexity=1 + (whole.perplexity + luck) / 100, tokens=tokens, **figures)


class Stepwise(Conducted):
    """A search by evolution in steps, on a text of eight windows."""

    def __init__(self, redis: Redis, keys: Keys, folder: Path, **update: Any) -> None:
        super().__init__(redis, keys, folder, settings=chosen(**update))

    async def open(self) -> Search:
        search = await super().open()
        search.card = CARD.model_copy(update={"dense": CARD.dense.model_copy(update={"tokens": WINDOWS * 31})})
        return search


async def searched(
    redis: Redis, folder: Path, worker: Callable[[Candidate], Outcome] = on_windows, **update: Any
) -> Search:
    conducted = Stepwise(redis, Keys("steps"), folder, **update)
    async with evaluating(redis, conducted.keys, worker):
        return await conducted.run()


def trials_of(search: Search, round_: int) -> list[list[Candidate]]:
    """The trials of a round, step by step."""
    steps: defaultdict[int, list[Candidate]] = defaultdict(list)
    for candidate in search.ledger.values():
        if candidate.on_windows is not None and candidate.provenance.round == round_:
            steps[len(candidate.on_windows)].append(candidate)
    return [steps[count] for count in sorted(steps)]


async def test_each_step_tries_the_best_of_the_step_before_and_the_best_of_all_are_measured_whole(
    redis: Redis, tmp_path: Path
) -> None:
    search = await searched(redis, tmp_path)
    outcomes = {e.candidate.id: e.outcome for e in search.population}

    def fitness(trial: Candidate) -> float:
        outcome = outcomes[trial.id]
        assert isinstance(outcome, Sampled)
        return outcome.fitness

    drawn = set()
    for round_ in (1, 2, 3):
        first, second = trials_of(search, round_)
        assert [len(first), len(second)] == [step["offspring"] for step in STEPS]
        assert len({trial.plan for trial in first}) == len(first)
        for trials in (first, second):
            (windows,) = {trial.on_windows for trial in trials}  # the same for all siblings
            assert windows is not None and len(set(windows)) == len(windows) and set(windows) <= set(range(WINDOWS))
            drawn.add(windows)
        whole = [c for c in search.ledger.values() if c.is_proposal and c.provenance.round == round_]
        assert {c.plan for c in second} == {c.plan for c in sorted(first, key=fitness)[: len(second)]}
        assert [c.plan for c in whole] == [c.plan for c in sorted(second, key=fitness)[:WHOLE]]
        parent = search.population.top(1, before=round_)[0].candidate
        assert all(c.provenance.parents == (parent.id,) for c in [*first, *second, *whole])
        assert all(c.plan != parent.plan for c in first)
    assert len(drawn) > 3  # windows are drawn anew


async def test_a_trial_is_no_member_no_proposal_and_never_the_best(redis: Redis, tmp_path: Path) -> None:
    search = await searched(redis, tmp_path)
    count = 3 * sum(step["offspring"] for step in STEPS)
    assert search.proposed == search.planned == len(search.population) == 5 + 3 * WHOLE
    best = search.population.best()
    assert best is not None and best.candidate.on_windows is None
    assert isinstance(best.outcome, Measured) and best.outcome.perplexity > 10
    assert all(tried.candidate.on_windows is None for tried in search.view(4).recent)
    summary = summarise("test", SPEC, CARD, search.ledger, search.population, {}, finished=True)
    assert summary.trials == count
    assert sum(summary.candidates["by_agent"].values()) == search.proposed
    assert summary.candidates["by_outcome"] == {"measured": search.proposed, "failed": 0, "stopped": 0}
    tally = Tally()
    improvements = [is_best for _, is_best in tally.take(search.ledger, search.population)]
    assert tally.by_source["trial"] == tally.outcomes["trial", "sampled"] == count
    assert 0 < sum(improvements) < 10
    records = evaluations(tmp_path)
    assert sum(record["outcome"]["kind"] == "sampled" for record in records) == count
    assert sum("on_windows" in record for record in records) == count


async def test_people_are_told_how_many_trials_there_were_and_of_none_but_those_that_failed(
    redis: Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = await searched(redis, tmp_path, half_fails)
    around = Around("run", None, (), QueueDepth())
    seen = Seen("test", SPEC, search.ledger, search.population, {}, None, around, Condition())
    follower = Follower()
    follower.look(dataclasses.replace(seen, ledger={}, population=Population()))
    told = [event.record() for event in follower.look(seen)]
    of_trials = [record for record in told if "on_windows" in record]
    failed = [e for e in search.population if e.candidate.on_windows is not None and isinstance(e.outcome, Failed)]
    assert len(of_trials) == len(failed) > 0
    assert {record["event"] for record in of_trials} == {"candidate_failed"}
    assert sum(record["event"] == "candidate_measured" for record in told) == search.proposed + 1  # and uniform
    summary = summarise("test", SPEC, CARD, search.ledger, search.population, {}, finished=True)
    status = follower.status
    assert status is not None and status.trials == summary.trials > 0
    assert summary.trials + len(failed) == sum(c.on_windows is not None for c in search.ledger.values())
    assert (status.failed, status.candidates, status.waiting) == (0, search.proposed, 0)
    show(summary, Console(width=200))
    assert f"measured on a few windows, to choose among siblings: {summary.trials}\n" in capsys.readouterr().out


@pytest.mark.parametrize("update", [{}, {"max_tokens": 5 * 62 + 1}], ids=["rounds", "tokens"])
async def test_a_search_in_steps_that_was_killed_anywhere_has_the_history_of_an_undisturbed_one(
    redis: Redis, tmp_path: Path, update: dict[str, Any]
) -> None:
    calm = Stepwise(redis, Keys("calm"), tmp_path, **update)
    async with evaluating(redis, calm.keys, on_windows):
        undisturbed = await calm.run()
    assert undisturbed.proposed == 5 + (1 if update else 3) * WHOLE
    measurements: Counter[str] = Counter()
    for life in range(1, 100):
        conducted = Stepwise(redis, Keys("killed"), tmp_path, **update)
        search = await conducted.open()
        async with evaluating(redis, conducted.keys, on_windows) as evaluated:
            killed = await killed_with(search, len(search.ledger) + 1 + life % 5)
        conducted.journal.close()
        measurements += evaluated
        if not killed:
            break
    assert life >= 5
    assert {c.id: c for c in search.ledger.values()} == {c.id: c for c in undisturbed.ledger.values()}
    assert set(measurements) == set(search.ledger) and set(measurements.values()) == {1}


def half_fails(candidate: Candidate) -> Outcome:
    """Of what is tried, and not of what is measured whole."""
    is_out = candidate.on_windows is not None and candidate.plan.layers[0].mlp_channels % 2
    return Failed(reason="not-finite") if is_out else on_windows(candidate)


async def test_what_fails_in_a_step_goes_no_further_and_is_no_failed_candidate(redis: Redis, tmp_path: Path) -> None:
    search = await searched(redis, tmp_path, half_fails)
    failed = {e.candidate.plan for e in search.population if isinstance(e.outcome, Failed)}
    assert failed
    assert not failed & {c.plan for c in search.ledger.values() if c.is_proposal and c.provenance.round}
    summary = summarise("test", SPEC, CARD, search.ledger, search.population, {}, finished=True)
    assert summary.candidates["by_outcome"]["failed"] == 0


async def test_where_all_fail_the_search_comes_to_its_end(redis: Redis, tmp_path: Path) -> None:
    def none_can_be_tried(candidate: Candidate) -> Outcome:
        return on_windows(candidate) if candidate.on_windows is None else Failed(reason="out-of-memory")

    search = await searched(redis, tmp_path, none_can_be_tried)
    assert search.proposed == len(search.population) == 5


async def test_what_failed_whole_is_not_tried_again(redis: Redis, tmp_path: Path) -> None:
    def offspring_fail(candidate: Candidate) -> Outcome:
        is_out = candidate.on_windows is None and candidate.provenance.round > 0
        return Failed(reason="timeout") if is_out else on_windows(candidate)

    search = await searched(redis, tmp_path, offspring_fail, rounds=8)
    in_vain = [e.candidate for e in search.population if isinstance(e.outcome, Failed)]
    failed = {candidate.plan: candidate.provenance.round for candidate in in_vain}
    assert len(failed) == 8 * WHOLE
    trials = [c for c in search.ledger.values() if c.on_windows is not None and c.plan in failed]
    assert trials and all(trial.provenance.round <= failed[trial.plan] for trial in trials)


async def test_tokens_of_trials_count(redis: Redis, tmp_path: Path) -> None:
    """The first population takes 5 × 62 tokens here, a round 2 × 62 and 24 × 31 for its trials."""
    search = await searched(redis, tmp_path, max_tokens=10 * 62)
    assert search.proposed == 5 + WHOLE


async def test_nothing_is_tried_when_the_time_is_over(redis: Redis, tmp_path: Path) -> None:
    conducted = Stepwise(redis, Keys("steps"), tmp_path, budget_hours=1.0)
    search = await conducted.open()
    search._seconds = lambda: 3600.0 * (len(search.ledger) > 5 + 1 + 7)  # in the midst of the first step
    async with evaluating(redis, conducted.keys, on_windows):
        await search.run()
    conducted.journal.close()
    assert search.proposed == 5
    assert len(search.ledger) == 5 + 1 + 8


async def test_so_many_siblings_that_no_pool_has_connections_for_each(redis: Redis, tmp_path: Path) -> None:
    steps = [{"offspring": 300, "windows": 1}]
    with structlog.testing.capture_logs() as logs:
        search = await searched(redis, tmp_path, selection_steps=steps, rounds=1)
    assert sum(c.on_windows is not None for c in search.ledger.values()) == 300
    names = {event["event"] for event in logs}
    assert "siblings_ranked" in names and not names & {"redis_unreachable", "redis_back"}


@pytest.fixture(scope="module", params=["perplexity", "kl"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    made = tiny_spec(tmp_path_factory.mktemp("steps"))
    fitness = made.fitness.model_copy(update={"windows": 5, "seqlen": 32})
    return Session(made.model_copy(update={"fitness": fitness, "measure": request.param}), sensitivity=False)


def test_a_worker_measures_these_windows_alone(session: Session) -> None:
    plan = session.spec.uniform_plan(session.shape)
    whole = session.race(plan, Race(against=()))
    assert isinstance(whole, Measured)
    for windows in ((0,), (4,), (1, 3)):
        request = {"plan": plan.model_dump(), "text": "fitness", "race": None, "on_windows": list(windows)}
        sampled = answer(session, request)
        assert isinstance(sampled, Sampled)
        assert sampled.tokens == 31 * len(windows) and sampled.parameters == whole.parameters
        mean = math.fsum(whole.losses[window] for window in windows) / len(windows)
        seen = math.log(sampled.perplexity) if sampled.kl is None else sampled.kl
        assert seen == pytest.approx(mean, abs=1e-5)
    assert session.sample(plan, range(5)).fitness == pytest.approx(whole.fitness, abs=1e-9)


@pytest.mark.parametrize("windows", [[5], [-1], []])
def test_a_window_that_is_not_there_has_failed_as_invalid(session: Session, windows: list[int]) -> None:
    plan = dense_plan(session.shape).model_dump()
    outcome = answer(session, {"plan": plan, "text": "fitness", "race": None, "on_windows": windows})
    assert isinstance(outcome, Failed) and outcome.reason == "invalid"
    assert outcome.detail == f"there are no windows {windows} in a text of 5"


REFUSED = {
    "proposer: llm": r"selection_steps is for the proposer `evolution`, not for 'llm'",
    "mode: steady-state": r"not with `steady-state`",
    "mutations: 4": r"fewer offspring.*mutations \(4\) and search.crossovers \(0\) together.*here 12, 4, 4",
    "selection_steps: [{offspring: 4, windows: 1}, {offspring: 12, windows: 3}]": r"fewer offspring.*here 4, 12, 2",
    "selection_steps: [{offspring: 12, windows: 3}, {offspring: 4, windows: 3}]": r"more windows.*here 3, 3",
    "selection_steps: [{offspring: 12, windows: 8}]": r"windows \(8\) must be fewer than data.fitness_windows \(8\)",
    "selection_steps: 8": r"selection_steps cannot be '8': input should be a list",
    "selection_steps: [{offspring: 12, window: 1}]": r"there is no setting 'search\.selection_steps\.0\.window'",
    "max_tokens: 100": r"max_tokens \(100\) is smaller than what the first population takes \(30 x 16,376\)",
    "selection_steps: [{offspring: 12}]": r"selection_steps\.0\.windows",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_steps_that_cannot_be_are_refused(tmp_path: Path, setting: str) -> None:
    name, _, value = setting.partition(": ")
    told = {"proposer": "evolution", "mutations": "2", "crossovers": "0", "selection_steps": str(STEPS), name: value}
    given = {f"search.{key}": text for key, text in told.items()}
    given |= {"target.model": "m", "target.rate": "0.3", "data.fitness_windows": str(WINDOWS)}
    file = tmp_path / "search.yaml"
    file.write_text("{}")
    with pytest.raises(SettingsError, match=REFUSED[setting]):
        load(file, [f"{key}={text}" for key, text in given.items()])


def test_a_text_that_proves_too_short_for_the_steps_is_refused() -> None:
    with pytest.raises(DataError, match=r"their windows \(3\) must be fewer .* which has 3"):
        check_windows(chosen(), 3)
    check_windows(chosen(), 4)
    check_windows(settings(), 1)


def test_a_trial_comes_back_from_the_folders_copy(tmp_path: Path) -> None:
    whole = candidates(1)[0]
    windows = (1, 5)
    id_ = candidate_id(whole.plan, SPEC.fingerprint, on_windows=windows)
    trial = whole.model_copy(update={"id": id_, "on_windows": windows})
    population = Population()
    population.insert(whole, measured(20.0, whole))
    assert not population.insert(trial, on_windows(trial))
    journal = Journal(tmp_path)
    journal.begin("test", SPEC, CARD, population)
    journal.close()
    history = recovered(tmp_path, SPEC, History({}, {}))
    assert history is not None and history.ledger == {whole.id: whole, id_: trial}
    assert history.outcomes[id_] == on_windows(trial)
    assert id_ != whole.id != candidate_id(whole.plan, SPEC.fingerprint, on_windows=(1,))
