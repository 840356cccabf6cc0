"""The population and its keeper."""

import asyncio
import itertools
from collections.abc import Sequence

from agents.population.keeper import PopulationKeeper
from agents.population.population import Evaluation, Population
from protocol.plans.candidate import Candidate, Failed, Result
from tests.support.samples import candidate, candidates, measured


def of_round(round_: int, made: Candidate) -> Candidate:
    return made.model_copy(update={"provenance": made.provenance.model_copy(update={"round": round_})})


def population_of(many: Sequence[Candidate], perplexities: Sequence[float]) -> Population:
    population = Population()
    for each, perplexity in zip(many, perplexities, strict=True):
        population.insert(each, measured(perplexity, each))
    return population


def test_members_are_ranked_by_perplexity_and_ties_by_round() -> None:
    many = candidates(4)
    many[2] = of_round(2, many[2])
    population = population_of(many, (5.0, 3.0, 5.0, 4.0))
    assert [e.candidate for e in population.top(4)] == [many[1], many[3], many[0], many[2]]
    assert [e.candidate for e in population.top(2)] == [many[1], many[3]]


def test_members_are_ranked_by_divergence_where_it_was_measured() -> None:
    population = Population()
    many = candidates(3)
    for each, kl in zip(many, (0.2, 0.0, 0.1), strict=True):
        population.insert(each, measured(30 - 100 * kl, each, kl=kl))
    assert [e.candidate for e in population.top(3)] == [many[1], many[2], many[0]]


def test_the_rank_does_not_depend_on_which_outcome_came_first() -> None:
    populations = [population_of(order, (5.0,) * 4) for order in itertools.permutations(candidates(4))]
    assert len({tuple(e.candidate.id for e in population.top(4)) for population in populations}) == 1


def test_members_of_later_rounds_can_be_left_out() -> None:
    many = [of_round(number, each) for number, each in enumerate(candidates(4))]
    population = population_of(many, (5.0, 4.0, 3.0, 2.0))
    assert [e.candidate.id for e in population.top(4, before=2)] == [many[1].id, many[0].id]
    assert [e.candidate.id for e in population.top(1, before=2)] == [many[1].id]


def test_only_an_improvement_is_a_new_best() -> None:
    population = Population()
    many = candidates(3)
    many[2] = of_round(2, many[2])
    answers = [population.insert(c, measured(p, c)) for c, p in zip(many, (5.0, 4.0, 4.0), strict=True)]
    assert answers == [True, True, False]


def test_failed_candidates_and_baselines_are_remembered_but_are_no_members() -> None:
    population = Population()
    failed, other = candidates(2)
    baseline = candidate((0.3,) * 4, agent="baseline", round_=0)
    assert not population.insert(failed, Failed(reason="timeout"))
    assert not population.insert(baseline, measured(1.0, baseline))
    assert population.insert(other, measured(9.0, other))
    assert len(population) == 1
    assert failed.id in population and baseline.id in population
    best = population.best()
    assert best is not None and best.candidate == other


def test_a_second_outcome_changes_nothing() -> None:
    population = Population()
    (one,) = candidates(1)
    population.insert(one, measured(5.0, one))
    assert not population.insert(one, measured(1.0, one))
    assert [e.outcome for e in population] == [measured(5.0, one)]


class Scripted:
    """Results to consume, and what was applied."""

    def __init__(self, results: list[Result]) -> None:
        self._results = results
        self.applied: list[str] = []
        self.dropped: list[str] = []

    async def results(self, cursor: str) -> list[Result]:
        await asyncio.sleep(0)
        return [r for r in self._results if float(r.cursor.replace("-", ".")) > float(cursor.replace("-", "."))]

    async def apply(self, result: Result) -> bool:
        self.applied.append(result.id)
        return self.applied.count(result.id) == 1

    async def drop(self, result: Result) -> None:
        self.dropped.append(result.id)


async def kept(source: Scripted, ledger: dict[str, Candidate]) -> list[tuple[Evaluation, bool]]:
    """Run a keeper until all of `ledger` is settled; the evaluations that it tells of, and whether each is the best."""
    noted: list[tuple[Evaluation, bool]] = []
    keeper = PopulationKeeper(source, Population(), ledger, on_evaluation=lambda e, best: noted.append((e, best)))
    running = asyncio.create_task(keeper.run())
    async with asyncio.timeout(10):
        await keeper.settled()
    running.cancel()
    return noted


async def test_the_keeper_applies_each_outcome_once_in_order_and_wakes_those_who_wait() -> None:
    one, two = candidates(2)
    ledger: dict[str, Candidate] = {one.id: one, two.id: two}
    outcomes = [(one.id, measured(5.0, one)), ("unknown", measured(1.0))]
    outcomes += [(one.id, measured(2.0, one)), (two.id, measured(4.0, two))]
    source = Scripted([Result(f"{number}-0", *each) for number, each in enumerate(outcomes, 1)])
    noted = await kept(source, ledger)
    assert [(e.candidate.id, best) for e, best in noted] == [(one.id, True), (two.id, True)]
    assert [e.outcome for e, _ in noted] == [measured(5.0, one), measured(4.0, two)]
    assert source.applied == [one.id, one.id, two.id]
    assert source.dropped == ["unknown"]


async def test_an_outcome_counts_even_if_the_reply_to_applying_it_got_lost() -> None:
    (one,) = candidates(1)
    source = Scripted([Result("1-0", one.id, measured(5.0, one))])
    source.applied.append(one.id)  # done, but the daemon did not hear of it and asks again
    assert [e.candidate for e, _ in await kept(source, {one.id: one})] == [one]
