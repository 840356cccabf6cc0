"""Proposals that are refused before they cost anything: nearly known ones, and hopeless ones."""

import random
from pathlib import Path

import pytest
from redis.asyncio import Redis

from agents import sieve
from agents.operators import random_rates
from agents.sieve import LEAST_OUTCOMES, Guesses, Neighbours
from agents.view import View
from protocol.keys import Keys
from tests.test_proposers import settings
from tests.test_search import Conducted, evaluating
from tests.test_trades import member, view_of


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_what_is_refused_for_a_guess_is_worse_than_the_population(granularity: str) -> None:
    view = view_of(granularity, 120)  # type: ignore[arg-type]
    guesses, rng = Guesses(view, len(view.population)), random.Random(3)
    last = view.population[-1].fitness
    refused = taken = 0
    for _ in range(200):
        new = member(view, random_rates(rng, len(view.units), 0.3))
        if guesses.refusal(new.candidate.plan):
            assert new.fitness > last
            refused += 1
        else:
            taken += 1
    assert refused > 3 and taken > 0


def test_nobody_is_refused_for_a_guess_from_little() -> None:
    """Not even what is clearly bad, and is known to be by one outcome more."""
    for outcomes, refused in ((LEAST_OUTCOMES - 1, False), (LEAST_OUTCOMES, True)):
        view = view_of("layer", outcomes)
        assert len(view.measured) == outcomes
        fragile = sorted(range(len(view.units)), key=lambda i: view.card.sensitivity[i])[-2:]
        bad = member(view, [0.95 if i in fragile else 0.3 for i in range(len(view.units))])
        assert bad.fitness > 1.2 * view.measured[-1].fitness
        guesses = Guesses(view, len(view.population))
        assert (guesses.refusal(bad.candidate.plan) is not None) == refused, outcomes


def test_nobody_is_refused_before_the_population_is_full() -> None:
    view = view_of("layer", 120)
    guesses, rng = Guesses(view, len(view.population) + 1), random.Random(3)
    new = [member(view, random_rates(rng, len(view.units), 0.3)) for _ in range(50)]
    assert not any(guesses.refusal(m.candidate.plan) for m in new)


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_the_errors_of_a_guess_are_those_on_what_it_has_not_seen(granularity: str) -> None:
    view = view_of(granularity, 40)  # type: ignore[arg-type]
    whole = view.surrogate
    for left_out in (0, 7, 39):
        others = tuple(m for i, m in enumerate(view.measured) if i != left_out)
        without = View(view.spec, view.card, 1, others[:10], {}, others).surrogate
        off = whole.rise(view.measured[left_out]) - without.guess(view.measured[left_out].candidate.plan)
        assert whole.errors[left_out] == pytest.approx(off, rel=0.35, abs=0.02)  # the scale is of the best, and centred


def test_what_is_nearly_known_is_refused_by_how_much_differs() -> None:
    view = view_of("layer", 1)
    base = view.measured[0].candidate
    known = Neighbours(view, 0.01, [base.plan])
    for points, refused in ((0.01, True), (0.3, False)):
        moved = [rate + points * (-1) ** i / 2 if i < 2 else rate for i, rate in enumerate(base.rates)]
        plan = member(view, moved).candidate.plan
        assert (known.refusal(plan) is not None) == refused, points
    far = member(view, [rate + 0.3 * (i == 0) - 0.3 * (i == 1) for i, rate in enumerate(base.rates)]).candidate.plan
    assert known.refusal(far) is None
    known.add(far)
    assert known.refusal(far) is not None
    assert Neighbours(view, 0.0, [far]).refusal(far) is None


async def test_a_search_keeps_its_candidates_apart_and_counts_what_it_refused(
    redis: Redis, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sieve, "DOUBTS", 0.0)  # in so small a search nothing hopeless is proposed
    apart = 0.02
    chosen = settings(least_difference=apart, screening=True, population=6, mutations=6, crossovers=4, rounds=6)
    conducted = Conducted(redis, keys, tmp_path, settings=chosen)
    async with evaluating(redis, keys):
        search = await conducted.run()
    plans = [c.plan for c in search.ledger.values() if c.provenance.agent != "baseline"]
    view: View = search.view(0)
    for i, plan in enumerate(plans):
        assert Neighbours(view, apart, plans[:i]).refusal(plan) is None
    assert search.screened > 0
