"""Rules as candidates: random ones, their offspring, the tuning of their numbers, and the choice of steps."""

import random
import re
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from agents.operators.plan_space import PlanSpace
from agents.operators.rules import (
    MIN_OUTCOMES,
    NOTICEABLE,
    at_rate,
    crossed,
    mutated,
    proposal_of,
    random_rule,
    rule_of,
    ruled_members,
    sample_rule_crossover,
    sample_rule_mutation,
    simplified,
    tuned,
    usable_features,
)
from agents.operators.strategy import (
    Record,
    next_step,
    possible_steps,
    sample_crossover_step,
    sample_mutation_step,
    step_records,
)
from agents.operators.surrogate import Surrogate
from agents.operators.trust_region import LONGEST
from agents.population.view import Member, Tried, View
from agents.prompting.rules import formula_pattern
from protocol.plans.candidate import Step
from protocol.plans.plan import removed_shares
from protocol.plans.rule import Rule
from protocol.plans.shape import Granularity
from tests.agents.operators.test_moves import member, view_of

every_granularity = pytest.mark.parametrize("granularity", ["layer", "block"])


def ruled(view: View, text: str, round_: int = 0) -> Member:
    """The member that a rule gives."""
    proposal = proposal_of(view, Rule.parse(text))
    made = member(view, proposal.rates, round_=round_)
    provenance = made.candidate.provenance.model_copy(update={"rule": proposal.rule})
    return replace(made, candidate=made.candidate.model_copy(update={"provenance": provenance}))


def with_members(view: View, *members: Member) -> View:
    ranked = tuple(sorted((*view.measured, *members), key=lambda m: m.fitness))
    return replace(view, measured=ranked, population=ranked[:10])


@every_granularity
def test_offspring_of_rules_are_rules_that_compute_on_this_model(granularity: Granularity) -> None:
    view, rng = view_of(granularity, 0), random.Random(0)
    rules = [random_rule(rng, view) for _ in range(20)]
    for _ in range(200):
        rules.append(mutated(rng, view, rng.choice(rules)))
        rules.append(crossed(rng, *rng.sample(rules, 2)))
    assert len({str(rule) for rule in rules}) > 250, "they differ"
    for rule in rules:
        assert Rule.parse(str(rule)).values(view.features) == pytest.approx(rule.values(view.features), rel=1e-6)


@every_granularity
def test_a_batch_of_plans_removes_what_the_exact_plans_remove(granularity: Granularity) -> None:
    view = view_of(granularity, 0)
    values = np.random.default_rng(1).normal(0.3, 0.4, (30, len(view.units)))
    batch = PlanSpace(view).shares(values)
    shape, spec = view.profile.shape, view.spec
    channel = 1.5 * shape.channel_parameters / min(unit.parameters for unit in view.units)
    for row, shares in zip(values, batch, strict=True):
        exact = removed_shares(spec.plan(spec.feasible(row.tolist(), shape), shape), shape, granularity)
        if granularity == "layer":  # there, the rounding of heads is within each layer
            channel = 0.02
        assert shares == pytest.approx(exact, abs=channel)


@every_granularity
def test_the_prediction_of_a_batch_is_that_of_single_plans(granularity: Granularity) -> None:
    view = view_of(granularity, 20)
    surrogate = Surrogate(view)
    plans = [member.candidate.plan for member in view.measured[:5]]
    shares = np.array([removed_shares(plan, view.profile.shape, granularity) for plan in plans])
    mean, std = surrogate.predict_shares(shares)
    assert mean.tolist() == pytest.approx([surrogate.predict(plan) for plan in plans])
    inputs = surrogate._inputs(shares)
    assert surrogate._prior_variance(inputs) == pytest.approx(np.diag(surrogate._covariance(inputs, inputs)))
    assert (std > 0).all()
    # The variance of a change is that of both ends, less twice their covariance: never more than (a + b)².
    _, change = surrogate.predict_changes(shares[0].tolist(), [dict(enumerate(shares[1].tolist()))])
    assert abs(std[0] - std[1]) - 1e-6 <= change[0] <= std[0] + std[1] + 1e-6


def test_far_from_all_outcomes_the_prediction_is_less_sure() -> None:
    view = view_of("block", 20)
    shares = np.array(removed_shares(view.measured[0].candidate.plan, view.profile.shape, "block"))
    far = np.clip(shares + np.linspace(-0.3, 0.3, len(shares)), 0, 0.9)
    _, std = Surrogate(view).predict_shares(np.array([shares, far]))
    assert std[1] > 2 * std[0]


def test_tuning_finds_better_numbers_by_the_surrogate_and_in_truth() -> None:
    view = view_of("block", 60)
    start = Rule.parse("rate - 0.01*sensitivity - 0.01*attention*depth")
    better = tuned(view, start, random.Random(3))
    assert better.features <= start.features and better.numbers != start.numbers
    assert tuned(view, start, random.Random(3)) == better, "the same seed tunes alike"
    before, after = (ruled(view, str(rule)).fitness for rule in (start, better))
    assert after < before


@pytest.mark.parametrize("seed", range(6))
def test_tuned_rules_stay_near_what_was_measured(seed: int) -> None:
    view = view_of("block", MIN_OUTCOMES)
    space = PlanSpace(view)
    centers = np.array([member.candidate.rates for member in view.population])

    def distance(rule: Rule) -> float:
        rates = space.rates(np.array([rule.rates(view.features)]))
        return float(np.abs(rates - centers).max(axis=1).min())

    start = Rule.parse("rate - 0.01*sensitivity - 0.01*depth*mlp + 0.01*last")
    rule = tuned(view, start, random.Random(seed))
    assert rule != start and distance(rule) <= max(LONGEST, distance(start)) + NOTICEABLE


def test_nothing_is_tuned_without_outcomes_or_numbers() -> None:
    start = Rule.parse("rate - 0.1*sensitivity")
    assert tuned(view_of("block", MIN_OUTCOMES - 1), start, random.Random(1)) == start
    assert str(tuned(view_of("block", 20), Rule.parse("rate - sensitivity"), random.Random(1))) == "rate - sensitivity"


def test_features_that_are_alike_for_all_units_are_left_out() -> None:
    assert "attention" in usable_features(view_of("block", 0))
    assert not {"attention", "mlp", "size"} & set(usable_features(view_of("layer", 0)))


def test_rules_have_their_parents_and_say_themselves() -> None:
    view = view_of("block", 10)
    first, second = ruled(view, "rate - 0.3*attention"), ruled(view, "rate - 0.1*sensitivity")
    view = with_members(view, first, second)
    rng = random.Random(0)
    parents = (first, second)  # they are in view.measured too
    mutant, joined = sample_rule_mutation(rng, view, parents), sample_rule_crossover(rng, view, parents)
    ids = {first.candidate.id, second.candidate.id}
    assert len(mutant.parents) == 1 and set(mutant.parents) <= ids and set(joined.parents) == ids
    assert mutant.rule and Rule.parse(mutant.rule).rates(view.features) == pytest.approx(mutant.rates, abs=1e-3)
    assert rule_of(first) == Rule.parse("rate - 0.3*attention") and rule_of(view_of("block", 1).measured[0]) is None


@pytest.mark.parametrize("seed", range(20))
def test_no_rule_is_crossed_with_itself(seed: int) -> None:
    view = view_of("block", 10)
    parents = (ruled(view, "rate - 0.3*attention"), ruled(view, "rate - 0.1*sensitivity"))
    joined = sample_rule_crossover(random.Random(seed), with_members(view, *parents), parents)
    assert len(set(joined.parents)) == 2


def test_a_stored_rule_that_cannot_be_read_is_no_rule() -> None:
    view = view_of("block", 10)
    made = ruled(view, "rate")
    provenance = made.candidate.provenance.model_copy(update={"rule": "rate - later_feature"})
    odd = replace(made, candidate=made.candidate.model_copy(update={"provenance": provenance}))
    assert rule_of(odd) is None and ruled_members(with_members(view, odd), (odd,)) == []


def test_a_model_with_one_unit_has_one_rule() -> None:
    view = view_of("layer", 0)
    shape = view.profile.shape.model_copy(update={"layers": view.profile.shape.layers[:1]})
    one = replace(view, profile=view.profile.model_copy(update={"shape": shape, "sensitivity": (0.1,)}))
    rule = random_rule(random.Random(0), one)
    assert str(rule) == str(mutated(random.Random(0), one, rule)) == "rate"
    assert re.search(formula_pattern(usable_features(one)), "rate")


def test_adding_the_same_to_all_units_changes_nothing() -> None:
    view = view_of("block", 0)
    plain, shifted = (Rule.parse(f"rate - 0.1*sensitivity{more}").rates(view.features) for more in ("", " + 0.7"))
    assert plain == pytest.approx(shifted)
    sizes = view.features["size"]
    assert sum(a * b for a, b in zip(plain, sizes, strict=True)) / sum(sizes) == pytest.approx(view.spec.rate)


def made_by(step: Step | None, view: View, fitness: float, number: int) -> Tried:
    """An offspring that a step has made."""
    plain = view.measured[number % 4].candidate
    provenance = plain.provenance.model_copy(update={"round": 1, "step": step})
    return Tried(plain.model_copy(update={"provenance": provenance}), fitness)


def shares_of_steps(view: View) -> dict[str, float]:
    drawn = [next_step(view, random.Random(seed)) for seed in range(300)]
    return {step: drawn.count(step) / len(drawn) for step in get_args(Step)}


@pytest.mark.parametrize("helps", get_args(Step))
def test_steps_are_chosen_by_what_they_brought(helps: Step) -> None:
    view = view_of("block", 10)
    view = with_members(view, ruled(view, "rate - 0.3*attention"))
    pairs = [(step, 20.0 - i if step == helps else 30.0) for i in range(8) for step in get_args(Step)]
    seen = replace(view, recent=tuple(made_by(step, view, fitness, i) for i, (step, fitness) in enumerate(pairs)))
    assert step_records(seen)[helps] == Record(8, 8)
    assert shares_of_steps(seen)[helps] > 0.95
    assert all(0.2 < share < 0.5 for share in shares_of_steps(view).values()), "nothing is known"


def test_without_a_rule_there_is_none_to_change_and_the_selector_may_choose() -> None:
    view = view_of("block", 10)
    assert possible_steps(view) == ("moves", "plans")
    assert shares_of_steps(replace(view, step="rules"))["rules"] == 0
    with_rule = with_members(view, ruled(view, "rate - 0.3*attention"))
    for step in get_args(Step):
        assert shares_of_steps(replace(with_rule, step=step))[step] == 1


@pytest.mark.parametrize(
    ("rule", "at_30_percent"),
    [
        (
            "least_damage - max(0, 0.34 - 0.57*rate)*tanh(depth)*mlp - 0.04*first",
            "least_damage - 0.169*tanh(depth)*mlp - 0.04*first",
        ),
        ("rate - 0.1*rate*depth", "rate - 0.1*rate*depth"),
        ("least_damage - 0.1*depth", "least_damage - 0.1*depth"),
    ],
)
def test_a_rule_that_corrects_an_allocation_is_for_the_rate_of_its_search(rule: str, at_30_percent: str) -> None:
    view = view_of("block", 20)
    assert view.spec.rate == 0.3 and str(at_rate(view, Rule.parse(rule))) == at_30_percent
    assert "least_damage" not in rule or "rate" not in tuned(view, Rule.parse(rule), random.Random(1)).features


def test_a_step_is_recorded_with_its_candidate() -> None:
    view = view_of("block", 10)
    view = with_members(view, ruled(view, "rate - 0.3*attention"))
    for sample in (sample_mutation_step, sample_crossover_step):
        made = [sample(random.Random(seed), view, view.population) for seed in range(20)]
        assert {proposal.step for proposal in made} == set(get_args(Step))
        assert all((proposal.rule is not None) == (proposal.step == "rules") for proposal in made)


@pytest.mark.parametrize(
    ("rule", "shorter"),
    [
        ("rate - 0.40231*attention + 0.0001*depth", "rate - 0.4*attention"),
        ("rate - 0.2*where(depth < 2, 0.5, 9)*mlp", "rate - 0.1*mlp"),
        ("rate + 0.00001*tanh(size)", "rate"),
        ("rate - 0.1*attention", "rate - 0.1*attention"),
        ("rate - 40*first", "rate - 2*first"),
        ("rate + 1.25*depth*mlp - 1.05*depth*mlp", "rate + 0.2*depth*mlp"),
        ("rate - 0.3*depth + (depth - 0.6*depth)", "rate + 0.1*depth"),
    ],
)
def test_parts_without_effect_are_left_out(rule: str, shorter: str) -> None:
    view = view_of("block", 0)
    found = simplified(view, Rule.parse(rule))
    before, after = (PlanSpace(view).rates(np.array([each.rates(view.features)])) for each in (Rule.parse(rule), found))
    assert np.abs(before - after).max() <= NOTICEABLE
    assert len(str(found)) <= len(shorter), found
