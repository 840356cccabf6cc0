"""Whole plans by the surrogate."""

import random
from dataclasses import replace

import numpy as np
import pytest

from agents.operators.genetic import random_rates
from agents.operators.plan_space import plan_space_of
from agents.operators.surrogate import surrogate_of
from agents.operators.trust_region import FIRST_SPREAD, LONGEST, moved_to_budget, sample_plan
from agents.population.view import Member, View
from protocol.plans.rates import weighted_mean
from protocol.plans.rule import DEFAULT_RULE
from protocol.plans.shape import Granularity
from tests.agents.operators.test_moves import member, view_of


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_a_plan_is_better_than_its_parent_as_far_as_the_surrogate_knows(granularity: Granularity) -> None:
    view = view_of(granularity, 10)
    space, surrogate = plan_space_of(view), surrogate_of(view)
    for seed in range(5):
        proposal = sample_plan(random.Random(seed), view, view.population)
        assert proposal.step == "plans"
        (parent,) = [m.candidate for m in view.measured if m.candidate.id in proposal.parents]
        assert all(abs(a - b) <= LONGEST + 1e-9 for a, b in zip(proposal.rates, parent.rates, strict=True))
        means, stds = surrogate.predict_shares(space.shares(np.array([proposal.rates, parent.rates])))
        assert (means - 3 * stds)[0] < (means - 3 * stds)[1] or means[0] < means[1]
        assert view.candidate_id(proposal.rates) not in {m.candidate.id for m in view.measured}


def test_plans_differ_and_the_same_seed_gives_the_same_plan() -> None:
    view = view_of("block", 10)
    made = [sample_plan(random.Random(seed), view, view.population) for seed in (0, 1, 2, 0)]
    assert made[0] == made[3]
    assert len({view.candidate_id(proposal.rates) for proposal in made}) == 3


def test_without_features_first_plans_are_near_the_best_known_rates() -> None:
    known = replace(view_of("layer", 0), population=(), measured=())
    unknown = replace(known, profile=known.profile.model_copy(update={"sensitivity": ()}))
    for view, near in ((known, known.features["least_damage"]), (unknown, unknown.features["rate"])):
        rates = sample_plan(random.Random(0), view, ()).rates
        assert max(abs(a - b) for a, b in zip(rates, near, strict=True)) < 5 * FIRST_SPREAD


def test_without_members_a_plan_near_the_default_rule_is_drawn() -> None:
    view = replace(view_of("layer", 0), population=(), measured=())
    influence = tuple(range(1, 1 + len(view.units)))
    view = replace(view, profile=view.profile.model_copy(update={"features": {"influence": influence}}))
    rates = sample_plan(random.Random(0), view, ()).rates
    changes = [rate - near for rate, near in zip(rates, DEFAULT_RULE.rates(view.features), strict=True)]
    assert len(set(changes)) == len(view.units) and max(map(abs, changes)) < 5 * FIRST_SPREAD


def at_rate(view: View, rate: float, members: int) -> tuple[Member, ...]:
    """The best members of a search like that of `view` at another rate."""
    spec = view.spec.model_copy(update={"rate": rate})
    there, rng = replace(view, spec=spec, population=(), measured=()), random.Random(7)
    found = {member(there, random_rates(rng, len(view.units), rate)) for _ in range(members)}
    return tuple(sorted(found, key=lambda each: each.fitness))


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_first_plans_that_learn_from_other_rates_are_better(granularity: Granularity) -> None:
    alone = replace(view_of(granularity, 0), population=(), measured=())
    learned = replace(alone, at_other_rates=(at_rate(alone, 0.2, 40), at_rate(alone, 0.4, 40)))
    means = []
    for view in (alone, learned):
        made = [sample_plan(random.Random(seed), view, ()) for seed in range(10)]
        assert len({view.candidate_id(proposal.rates) for proposal in made}) == 10
        means.append(sum(member(view, proposal.rates).fitness for proposal in made) / 10)
    assert means[1] < 0.99 * means[0]


def test_rates_of_another_search_keep_their_proportions() -> None:
    view = replace(view_of("layer", 0), population=(), measured=())
    (best, *_) = at_rate(view, 0.2, 3)
    moved = moved_to_budget(best, view)
    assert weighted_mean(moved, [unit.parameters for unit in view.units]) == pytest.approx(view.spec.rate, abs=1e-6)
    free = [(a, b) for a, b in zip(moved, best.candidate.rates, strict=True) if 0 < a < 0.9 and b > 0]
    assert len({round(a / b, 2) for a, b in free}) <= 2
