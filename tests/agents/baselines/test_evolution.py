"""Level switches: another unit gets exactly the parameters that one loses, within the bounds of both."""

import random
from typing import Any

import pytest

from agents.baselines.evolution import sample_switches
from agents.population.view import Member, View
from protocol.plans.candidate import Candidate, Provenance, candidate_id
from protocol.plans.plan import attention_levels, unit_bounds
from tests.agents.operators.test_moves import WIDE
from tests.support.samples import PROFILE, SPEC

CARD_OF_WIDE = PROFILE.model_copy(update={"shape": WIDE, "sensitivity": (0.1,) * len(WIDE.units("block"))})


def offspring(rates: list[float], **spec: Any) -> tuple[View, Member, list[tuple[float, ...]]]:
    """Return a view, a parent with about these rates, and the rates of its offspring."""
    view = View(SPEC.model_copy(update={"granularity": "block", **spec}), CARD_OF_WIDE, 1, ())
    feasible = view.spec.feasible(tuple(rates), WIDE)
    plan = view.spec.plan(feasible, WIDE)
    made_by = Provenance(agent="seed", source="allocation", round=0)
    id_ = candidate_id(plan, view.spec.fingerprint)
    parent = Member(Candidate(id=id_, rates=feasible, plan=plan, provenance=made_by), 1.0)
    rng = random.Random(0)
    return view, parent, [sample_switches(rng, view, [parent]).rates for _ in range(500)]


# The middle carries all of the pruning, as in LLM-Pruner: many units have nothing to give back.
HALF_WHOLE = [0.0 if i < 4 else 0.6 for i in range(len(WIDE.units("block")))]


@pytest.mark.parametrize("bounds", [{}, {"highest_rate": 0.5}, {"lowest_rate": 0.1}])
def test_a_switch_keeps_the_budget_and_leaves_all_others_alone(bounds: dict[str, float]) -> None:
    view, parent, made = offspring(HALF_WHOLE, **bounds)
    before, weights = parent.candidate.rates, [unit.parameters for unit in view.units]
    limits = unit_bounds(WIDE, "block", view.spec.lowest_rate, view.spec.highest_rate)
    changes = [{i for i, rate in enumerate(rates) if rate != before[i]} for rates in made]
    assert all(changes) and max(map(len, changes)) <= 6
    for rates in made:
        shifted = sum((rate - was) * weight for rate, was, weight in zip(rates, before, weights, strict=True))
        assert abs(shifted) <= 3 * 0.0125 * WIDE.layer_parameters(0)  # attention levels may differ by so much, thrice
        assert all(low - 1e-5 <= rate <= high + 1e-5 for rate, (low, high) in zip(rates, limits, strict=True))
    mlps = {i for i, unit in enumerate(view.units) if unit.kind == "mlp"}
    between_mlps = [rates for rates, changed in zip(made, changes, strict=True) if changed <= mlps]
    assert len(between_mlps) > 50
    for rates in between_mlps:
        assert sum((rates[i] - before[i]) * weights[i] for i in mlps) == pytest.approx(0, abs=1e-6)


def test_attention_that_is_pruned_a_little_is_made_whole_again() -> None:
    """Its rate, with five decimals, is not quite that of a level."""
    level = next(share for share, _ in attention_levels(WIDE, 0) if share)
    attention = [i for i, unit in enumerate(WIDE.units("block")) if unit.kind == "attention"]
    _, parent, made = offspring([level if i in attention else 0.3 for i in range(len(WIDE.units("block")))])
    assert any(rates[i] < 1e-4 < parent.candidate.rates[i] for rates in made for i in attention)
