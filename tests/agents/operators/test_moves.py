"""The surrogate's predictions, the menus that it ranks (moves, mixes), and the effects of earlier mutations."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

from agents.operators.genetic import random_rates
from agents.operators.mixes import mix_menu, on_budget
from agents.operators.moves import OFFERED, UNITS_PER_SIDE, Move, apply_moves, move_menu
from agents.operators.sampling import RANKED_MOVES, sample_move_parent, sample_ranked_mix, sample_ranked_moves
from agents.operators.surrogate import Surrogate, surrogate_of
from agents.population.view import Member, Tried, View
from agents.prompting.descriptions import moves_in_words
from agents.prompting.feedback import effects_of_changes
from protocol.plans.candidate import Candidate, Provenance, candidate_id
from protocol.plans.plan import Plan, attention_levels, removed_shares
from protocol.plans.shape import Granularity, LayerShape, ModelShape
from protocol.plans.single_unit_pruning import single_unit_removed_share
from protocol.plans.spec import SearchSpec
from tests.support.samples import PROFILE, SHAPE, SPEC

LAYERS = 12
WIDE = SHAPE.model_copy(update={"layers": (LayerShape(query_heads=4, kv_heads=2, mlp_channels=64),) * LAYERS})


def spec_of(granularity: Granularity) -> SearchSpec:
    return SPEC.model_copy(update={"granularity": granularity})


def truth(plan: Plan, shape: ModelShape, granularity: Granularity) -> float:
    """A rise that differs between units and grows faster than their shares and than the sum over units."""
    shares = removed_shares(plan, shape, granularity)
    damage = sum((0.3 + (7 * i) % 5) * share**2 for i, share in enumerate(shares)) / len(shares)
    return damage + 0.3 * damage**2


def profile_sensitivity(granularity: Granularity) -> tuple[float, ...]:
    """Return a sensitivity as a worker measures it: the rise of each unit alone, unlike that among other units."""
    count = len(WIDE.units(granularity))
    return tuple((0.3 + (7 * i) % 5) * 0.3**2 / count * (0.6 + 0.8 * ((3 * i) % 4) / 3) for i in range(count))


def member(view: View, rates: Sequence[float], *, round_: int = 0, parents: tuple[str, ...] = ()) -> Member:
    spec, shape = view.spec, view.profile.shape
    feasible = spec.feasible(tuple(rates), shape)
    plan = spec.plan(feasible, shape)
    who = Provenance(agent="mutator", source="llm", round=round_, parents=parents)
    made = Candidate(id=candidate_id(plan, spec.fingerprint), rates=feasible, plan=plan, provenance=who)
    return Member(made, 10 * math.exp(truth(plan, shape, spec.granularity)))


def view_of(granularity: Granularity, measured: int) -> View:
    spec = spec_of(granularity)
    profile = PROFILE.model_copy(update={"shape": WIDE, "sensitivity": profile_sensitivity(granularity)})
    empty = View(spec, profile, 1, ())
    rng = random.Random(1)
    members = {
        m.candidate.id: m for m in (member(empty, random_rates(rng, len(empty.units), 0.3)) for _ in range(measured))
    }
    ranked = tuple(sorted(members.values(), key=lambda m: m.fitness))
    return View(spec, profile, 1, ranked[:10], {}, ranked)


def shifted(view: View, parent: Member, first: int, by: float, round_: int = 0) -> Member:
    """A child of `parent` whose unit `first` is pruned `by` more, and the next one by as much less."""
    rates = list(parent.candidate.rates)
    rates[first] += by
    rates[first + 1] -= by
    return member(view, rates, round_=round_, parents=(parent.candidate.id,))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    def ranks(values: Sequence[float]) -> list[int]:
        order = sorted(range(len(values)), key=lambda i: values[i])
        return [order.index(i) for i in range(len(values))]

    n = len(first)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(ranks(first), ranks(second), strict=True)) / (n * (n * n - 1))


def error_of(view: View, seed: int = 99) -> tuple[float, float]:
    """Rank correlation with the truth, and mean error in nats, over new random candidates."""
    surrogate, rng = Surrogate(view), random.Random(seed)
    new = [member(view, random_rates(rng, len(view.units), 0.3)) for _ in range(60)]
    predicted = [surrogate.predict(m.candidate.plan) for m in new]
    true = [math.log(m.fitness / 10) for m in new]
    off = sum(abs(g - t) for g, t in zip(predicted, true, strict=True)) / len(new)
    return rank_correlation(predicted, true), off


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_the_surrogate_knows_the_sensitivity_before_anything_is_measured_and_learns_from_outcomes(
    granularity: Granularity,
) -> None:
    before, far = error_of(view_of(granularity, 0))
    after, near = error_of(view_of(granularity, 80))
    assert before > 0.3
    assert after > max(before, 0.85) and near < far / 3


def test_before_anything_is_measured_units_add_up_as_the_profile_says() -> None:
    view = view_of("layer", 0)
    plan = member(view, random_rates(random.Random(5), len(view.units), 0.3)).candidate.plan
    alone = [single_unit_removed_share(unit, view.spec, WIDE) for unit in view.units]
    ratios = [share / whole for share, whole in zip(removed_shares(plan, WIDE, "layer"), alone, strict=True)]
    harms = [s * (r if r <= 1 else r**2) for r, s in zip(ratios, view.profile.sensitivity, strict=True)]
    assert Surrogate(view).predict(plan) == pytest.approx(sum(harms))
    means, _ = Surrogate(view).predict_changes((0.0,) * LAYERS, [{0: alone[0]}, {0: alone[0], 3: alone[3] / 2}])
    first, both = view.profile.sensitivity[0], view.profile.sensitivity[0] + view.profile.sensitivity[3] / 2
    assert means.tolist() == pytest.approx([first, both])


def test_without_sensitivity_all_units_are_alike() -> None:
    view = view_of("layer", 0)
    base, changes = (0.0,) * LAYERS, [{3: 0.5}, {5: 0.5}]
    unlike = Surrogate(view).predict_changes(base, changes)[0]
    assert unlike[0] > unlike[1]
    alike = View(view.spec, view.profile.model_copy(update={"sensitivity": ()}), 1, ())
    assert len({round(float(change), 9) for change in Surrogate(alike).predict_changes(base, changes)[0]}) == 1


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_changes_are_those_between_predictions_and_surer_near_what_was_measured(granularity: Granularity) -> None:
    view = view_of(granularity, 40)
    surrogate, base = Surrogate(view), view.measured[0].candidate.plan
    shares = removed_shares(base, WIDE, granularity)
    others = [removed_shares(m.candidate.plan, WIDE, granularity) for m in view.measured[1:6]]
    changes = [{i: rate for i, rate in enumerate(other) if rate != shares[i]} for other in others]
    means, stds = surrogate.predict_changes(shares, changes)
    differences = [surrogate.predict(m.candidate.plan) - surrogate.predict(base) for m in view.measured[1:6]]
    assert means.tolist() == pytest.approx(differences, abs=1e-9)
    alone = Surrogate(View(view.spec, view.profile, 1, (), {}, view.measured[:1]))
    assert (stds < alone.predict_changes(shares, changes)[1] / 2).all()
    assert surrogate.predict_changes(shares, [{0: shares[0]}])[1][0] == pytest.approx(0, abs=1e-6)
    small, large = surrogate.predict_changes(shares, [{0: shares[0] + 0.01}, {0: shares[0] + 0.3}])[1]
    assert 0 < small < large


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_moves_keep_the_budget_and_mostly_help(granularity: Granularity) -> None:
    view = view_of(granularity, 60)
    parent = view.measured[30]
    weights = [unit.parameters for unit in view.units]
    helped = 0
    for seed in range(10):
        moves = move_menu(view, parent, random.Random(seed), RANKED_MOVES)
        assert len(moves) == RANKED_MOVES and moves[0].mean < 0
        assert [t.mean for t in moves] == sorted(t.mean for t in moves)
        for move in moves:
            rates = apply_moves(parent, [move]).rates
            shifted = sum((a - b) * w for a, b, w in zip(rates, parent.candidate.rates, weights, strict=True))
            assert abs(shifted) <= 1e-4 * sum(weights)
            assert all(0 <= rate <= 1 for rate in rates)
            helped += member(view, rates).fitness < parent.fitness
    assert helped >= 0.7 * 10 * RANKED_MOVES


def test_attention_changes_by_whole_levels() -> None:
    view = view_of("block", 60)
    rng, seen = random.Random(0), 0
    for parent in view.measured[:20]:
        for move in move_menu(view, parent, rng, 10):
            for unit, rate in ((move.more, move.more_rate), (move.less, move.less_rate)):
                if view.units[unit].kind == "attention":
                    levels = [share for share, _ in attention_levels(WIDE, view.units[unit].layer)]
                    assert min(abs(rate - level) for level in levels) < 1e-3
                    seen += 1
    assert seen > 5


def test_menus_differ_between_calls_and_no_unit_fills_one() -> None:
    view = view_of("block", 60)
    menus = [move_menu(view, view.measured[0], random.Random(seed), 10) for seed in range(5)]
    assert len({tuple((t.more, t.less) for t in moves) for moves in menus}) == 5
    for moves in menus:
        for unit in range(len(view.units)):
            assert sum(unit in (t.more, t.less) for t in moves) <= 2


def test_a_model_that_cannot_be_pruned_otherwise_has_no_moves() -> None:
    view = view_of("layer", 0)
    spec = view.spec.model_copy(update={"lowest_rate": 0.3, "highest_rate": 0.3})
    narrow = View(spec, view.profile, 1, ())
    parent = member(narrow, (0.3,) * LAYERS)
    assert move_menu(narrow, parent, random.Random(0), 10) == ()


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_mixes_are_ranked_and_near_the_budget(granularity: Granularity) -> None:
    view = view_of(granularity, 60)
    mixes = mix_menu(view, view.measured[:10], random.Random(0), 100)
    assert len(mixes) > 20
    assert [m.predicted for m in mixes] == sorted(m.predicted for m in mixes)
    true = [member(view, m.proposal.rates).fitness for m in mixes]
    assert sum(true[:8]) / 8 < sum(true[8:]) / len(true[8:])
    weights = [unit.parameters for unit in view.units]
    for mix in mixes:
        rates = on_budget(view, mix.proposal.rates)
        assert sum(r * w for r, w in zip(rates, weights, strict=True)) / sum(weights) == pytest.approx(0.3, abs=0.02)


def test_a_menu_has_no_mix_that_was_measured() -> None:
    view = view_of("block", 60)
    parents = view.measured[:10]
    before = mix_menu(view, parents, random.Random(0), 100)
    known = {view.candidate_id(mix.proposal.rates): 10.0 for mix in before[::2]}
    informed = replace(view, fitness_of=known.get)
    assert mix_menu(informed, parents, random.Random(0), 100) == tuple(
        mix for mix in before if view.candidate_id(mix.proposal.rates) not in known
    )
    assert mix_menu(informed, parents, random.Random(0), 3) == mix_menu(informed, parents, random.Random(0), 100)[:3]


def test_the_mean_of_a_move_is_shown_in_percent_of_the_fitness() -> None:
    view = view_of("layer", 60)
    parent = view.measured[5]
    (move, *_) = move_menu(view, parent, random.Random(0), 10)
    assert moves_in_words(view, parent, [move])[0].endswith(
        f": {100 * math.expm1(move.mean):+.1f} % (+-{100 * move.std:.1f})"
    )
    divergent = View(view.spec.model_copy(update={"measure": "kl"}), view.profile, 1, ())
    little = Member(parent.candidate, 0.1)
    assert moves_in_words(divergent, little, [move])[0].endswith(
        f": {100 * move.mean / 0.1:+.1f} % (+-{100 * move.std / 0.1:.1f})"
    )


def test_parents_that_are_all_alike_have_no_mixes_and_the_fallback_is_random() -> None:
    view = view_of("layer", 10)
    same = [view.measured[0], view.measured[0]]
    assert mix_menu(view, same, random.Random(0), 8) == ()
    assert len(sample_ranked_mix(random.Random(0), view, same).rates) == LAYERS
    assert len(sample_ranked_moves(random.Random(0), view, same).rates) == LAYERS


def test_the_effects_of_changes_are_stated_latest_first() -> None:
    view = view_of("layer", 1)
    parent = view.measured[0]
    older, newer = shifted(view, parent, 3, 0.2, round_=1), shifted(view, parent, 8, -0.1, round_=2)
    ranked = tuple(sorted((parent, older, newer), key=lambda m: m.fitness))
    recent = tuple(Tried(m.candidate, m.fitness) for m in (parent, older, newer))
    after = View(view.spec, view.profile, 3, ranked, {}, ranked, recent)
    found = effects_of_changes(after, 5)
    assert [line.partition(":")[0] for line in found] == ["layer 8 -10, layer 9 +10", "layer 3 +20, layer 4 -20"]
    for line, child in zip(found, (newer, older), strict=True):
        assert ("helped" in line) == (child.fitness < parent.fitness)
        assert f"{100 * (child.fitness / parent.fitness - 1):+.1f} %" in line
    assert len(effects_of_changes(after, 1)) == 1


def test_a_list_is_compared_with_its_nearest_parent() -> None:
    view = view_of("layer", 3)
    _, second, _ = view.measured
    rates = shifted(view, second, 3, 0.1).candidate.rates
    child = member(view, rates, round_=1, parents=tuple(m.candidate.id for m in view.measured))
    recent = (Tried(child.candidate, child.fitness),)
    (effect,) = effects_of_changes(View(view.spec, view.profile, 2, view.measured, {}, view.measured, recent), 5)
    assert effect.startswith("layer 3 +10, layer 4 -10: ")
    assert f"{100 * (child.fitness / second.fitness - 1):+.1f} %" in effect


def test_a_candidate_stopped_in_a_race_teaches_too() -> None:
    view = view_of("layer", 30)
    parent = view.measured[0]
    worse = shifted(view, parent, 3, 0.2)
    stopped = (Tried(worse.candidate, 1.2 * parent.fitness, stopped=True),)
    raced = View(view.spec, view.profile, 3, view.population, {}, view.measured, stopped)
    plan = worse.candidate.plan
    assert surrogate_of(raced).predict(plan) > surrogate_of(view).predict(plan) + 0.01
    assert effects_of_changes(raced, 5) == ["layer 3 +20, layer 4 -20: hurt, +20.0 %, and was stopped early"]


def test_a_stopped_race_has_more_noise_than_a_whole_measurement() -> None:
    view = view_of("layer", 30)
    parent = view.measured[0]
    worse = Member(shifted(view, parent, 3, 0.2).candidate, 1.05 * parent.fitness)
    ranked = tuple(sorted((*view.measured, worse), key=lambda m: m.fitness))
    whole = View(view.spec, view.profile, 3, view.population, {}, ranked)
    stopped = (Tried(worse.candidate, worse.fitness, stopped=True),)
    raced = View(view.spec, view.profile, 3, view.population, {}, view.measured, stopped)
    off = [
        surrogate_of(each).rise(worse) - surrogate_of(each).predict(worse.candidate.plan)
        for each in (whole, raced, view)
    ]
    assert 0 < 2 * off[0] < off[1] < off[2]


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_a_menu_prefers_the_less_known_of_moves_with_the_same_mean(
    granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = view_of(granularity, 60)
    menus = [move_menu(view, view.population[0], random.Random(seed), 10) for seed in range(10)]
    monkeypatch.setattr("agents.operators.moves.KAPPA", 0.0)
    greedy = [move_menu(view, view.population[0], random.Random(seed), 10) for seed in range(10)]

    def average(menus: Sequence[Sequence[Move]], name: str) -> float:
        return statistics.fmean(getattr(move, name) for moves in menus for move in moves)

    assert average(menus, "std") > 1.02 * average(greedy, "std")
    assert average(greedy, "mean") < average(menus, "mean") < 0


def test_one_menu_covers_some_units_and_several_menus_cover_most() -> None:
    view = view_of("block", 60)
    parent = view.population[0]
    menus = [move_menu(view, parent, random.Random(seed), 10) for seed in range(12)]
    used = [{unit for move in moves for unit in (move.more, move.less)} for moves in menus]
    units = len(view.units)
    assert all(len(each) <= max(UNITS_PER_SIDE, round(OFFERED * units)) for each in used)
    assert len(set().union(*used)) > max(len(each) for each in used)


def test_moves_mostly_begin_at_the_best_member() -> None:
    view = view_of("layer", 30)
    best, others = view.population[0], view.population[4:8]
    rng = random.Random(0)
    begun = [sample_move_parent(rng, view, others) for _ in range(1000)]
    assert 600 < sum(member is best for member in begun) < 730
    assert {member.candidate.id for member in begun} == {member.candidate.id for member in (best, *others)}
    assert sample_move_parent(rng, View(view.spec, view.profile, 1, ()), others) in others
