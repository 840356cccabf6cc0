"""Accepted and refused replies; no text does harm."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.llm.responses import LONGEST_REPLY
from agents.operators.edits import Mix, Mutation, Profile, apply_mix, apply_mutation, apply_profile
from agents.population.view import Member, View
from agents.prompting.replies import DEEPEST_NESTING, MEAN_TOLERANCE, parse_lists, parse_objects
from agents.prompting.schemas import Choice, apply_choice
from protocol.errors import InvalidReply
from protocol.plans.rates import weighted_mean
from tests.support.samples import PROFILE, SHAPE, SPEC, candidates

UNITS, BLOCKS = SHAPE.units("layer"), SHAPE.units("block")
NAMES, BLOCK_NAMES = ([unit.name for unit in units] for units in (UNITS, BLOCKS))
GOOD = (0.1, 0.2, 0.4, 0.5)
OTHER = (0.2, 0.3, 0.3, 0.4)
MEMBERS = tuple(Member(c, 20.0 + i) for i, c in enumerate(candidates(3)))
VIEW = View(SPEC, PROFILE, 1, MEMBERS)


def lists(text: str, count: int = 1) -> tuple[tuple[float, ...], ...]:
    return parse_lists(text, UNITS, SPEC.rate, count).good


def profiles(text: str) -> tuple[Any, ...]:
    return parse_objects(text, Profile, lambda reply: apply_profile(VIEW, reply), 1).good


def mutations(text: str) -> tuple[Any, ...]:
    return parse_objects(text, Mutation, lambda reply: apply_mutation(VIEW, MEMBERS, reply), 1).good


def mixes(text: str) -> tuple[Any, ...]:
    return parse_objects(text, Mix, lambda reply: apply_mix(VIEW, MEMBERS, reply), 1).good


def choices(text: str, count: int = 2) -> tuple[Any, ...]:
    return parse_objects(text, Choice, lambda reply: apply_choice(MEMBERS, count, reply), 1).good


def test_the_mean_of_blocks_counts_them_by_their_size() -> None:
    """Rates that prune almost only the MLPs are on budget, although their plain average is not."""
    sizes = {"attention": 1, "mlp": 9}
    uneven = [unit.model_copy(update={"parameters": sizes[unit.kind]}) for unit in BLOCKS]
    mostly_mlp = (0.0, 0.55) * len(SHAPE.layers)
    assert parse_lists(json.dumps([mostly_mlp]), uneven, 0.5, 1).good == (mostly_mlp,)
    even = [unit.model_copy(update={"parameters": 1}) for unit in BLOCKS]
    with pytest.raises(InvalidReply, match=r"has the average 0\.27500 instead of 0\.50000"):
        parse_lists(json.dumps([mostly_mlp]), even, 0.5, 1)


def test_a_valid_item_is_named_by_its_number_in_the_reply() -> None:
    parsed = parse_lists(json.dumps([[0.1], GOOD, OTHER]), UNITS, SPEC.rate, 2)
    assert parsed.names == ("Configuration 2", "Configuration 3")


@pytest.mark.parametrize(
    "text",
    [
        "[0.1, 0.2, 0.4, 0.5]",
        "```json\n[0.1, 0.2, 0.4, 0.5]\n```",
        "Here you are: [0.10000, 0.20000, 0.40000, 0.50000]. Good luck!",
        '{"configurations": [[0.1, 0.2, 0.4, 0.5]]}',
        '{"layer 0": 0.1, "layer 1": 0.2, "layer 2": 0.4, "layer 3": 0.5}',
        '{"layer_3": 0.5, "layer_0": 0.1, "layer_2": 0.4, "layer_1": 0.2}',
        '{"0": 0.1, "1": 0.2, "2": 0.4, "3": 0.5}',
        "\ufeff[0.1, 0.2, 0.4, 0.5]",
    ],
)
def test_a_configuration_is_found_in_whatever_surrounds_it(text: str) -> None:
    assert lists(text) == (GOOD,)


@pytest.mark.parametrize(
    "text",
    [
        "[0.1, 0.2, 0.4, NaN]",
        "[0.1, 0.2, 0.4, Infinity]",
        "[0.1, 0.2, 0.4, 1e999]",
        "[0.1, 0.2, true, 0.5]",
        '["0.1", "0.2", "0.4", "0.5"]',
        '["10%", "20%", "40%", "50%"]',
        "[10%, 20%, 40%, 50%]",
        "[10, 20, 40, 50]",
        "[0.1, 0.2, 0.4, null]",
        "[0.1, 0.2, 0.4, 0.5,]",
        "[0.1, 0.2, 0.4, 0_5]",
        "[٠.١, ٠.٢, ٠.٤, ٠.٥]",
        "[0.1, 0.2, -0.4, 0.5]",
        "[0.1, 0.2, 0.4, " + "9" * 5000 + "]",
        "[0.1, 0.2, 0.4]",
        "[0.1, 0.2, 0.3, 0.3, 0.3]",
        "[]",
        "",
        "I cannot help with that.",
        " " * 1_000_000,
        "[" * 100_000,
        "[" * (DEEPEST_NESTING + 1) + "0.3" + "]" * (DEEPEST_NESTING + 1),
        "[0.1, 0.2, 0.4, 0.5]" + " " * LONGEST_REPLY,
        "| layer | rate |\n| --- | --- |\n| 0 | 0.1 |\n| 1 | 0.2 |\n| 2 | 0.4 |\n| 3 | 0.5 |",
        "[{number of layers} decimals]",
        '{"layer 0": 0.1, "layer 1": 0.2, "layer 2": 0.4}',
        '{"configurations": ["\\ud800"]}',
        "\ud800[0.9, 0.9, 0.9, 0.9]",
    ],
    ids=lambda text: repr(text[:25]),
)
def test_what_is_not_a_configuration_is_refused(text: str) -> None:
    with pytest.raises(InvalidReply):
        lists(text)


def test_a_wrong_number_of_rates_is_reported_with_both_numbers() -> None:
    with pytest.raises(InvalidReply, match="has 3 numbers instead of 4"):
        lists("[0.1, 0.2, 0.4]")


def test_a_mean_that_is_off_is_left_to_the_projection_within_the_tolerance() -> None:
    off = SPEC.rate + MEAN_TOLERANCE - 0.01
    assert lists(json.dumps([off] * 4)) == ((off,) * 4,)
    with pytest.raises(InvalidReply, match="average"):
        lists(json.dumps([SPEC.rate + MEAN_TOLERANCE + 0.01] * 4))


def test_a_configuration_given_twice_counts_once_and_is_reported() -> None:
    parsed = parse_lists(json.dumps([GOOD, GOOD, OTHER]), UNITS, SPEC.rate, 3)
    assert parsed.good == (GOOD, OTHER)
    assert len(parsed.problems) == 1 and "distinct" in parsed.problems[0]


def test_good_configurations_are_kept_beside_bad_ones() -> None:
    parsed = parse_lists("[0.1, 0.2, 0.4, 0.5]\n[0.1, 0.2]\n[0.2, 0.3, 0.3, 0.4]", UNITS, SPEC.rate, 3)
    assert parsed.good == (GOOD, OTHER)
    assert len(parsed.problems) == 1


def test_the_whole_lists_of_a_reply_that_was_cut_off_are_kept() -> None:
    assert lists('{"configurations": [[0.1, 0.2, 0.4, 0.5], [0.2, 0.3, 0.', count=2) == (GOOD,)


def test_no_more_configurations_are_taken_than_were_asked_for() -> None:
    assert lists(json.dumps([GOOD, OTHER]), count=1) == (GOOD,)


def test_blocks_may_be_given_by_name() -> None:
    named = {name: 0.2 + i / 40 for i, name in enumerate(BLOCK_NAMES)}
    assert parse_lists(json.dumps(named), BLOCKS, SPEC.rate, 1).good == (tuple(named.values()),)


def test_two_different_answers_are_refused() -> None:
    with pytest.raises(InvalidReply, match="more than one answer"):
        choices('{"parents": [1, 2]} or {"parents": [2, 3]}')


def test_a_draft_of_another_form_beside_the_answer_does_no_harm() -> None:
    assert choices('First {"plan": []}, then {"parents": [3, 1]}') == ((MEMBERS[0], MEMBERS[2]),)


@pytest.mark.parametrize("numbers", ["[1]", "[1, 1]", "[0, 1]", "[1, 4]", "[1.0, 2.0]", '["1", "2"]', "[true, 2]", "3"])
def test_a_choice_needs_two_numbers_of_members(numbers: str) -> None:
    with pytest.raises(InvalidReply):
        choices(f'{{"parents": {numbers}}}')


def test_a_profile_is_a_curve_through_its_points() -> None:
    """Kept units are left whole."""
    assert profiles('{"profile": [10, 40]}')[0].rates == pytest.approx((0.1, 0.2, 0.3, 0.4))
    assert profiles('{"keep": ["layer 0"], "profile": [10, 40]}')[0].rates[0] == SPEC.lowest_rate


def test_a_mutation_changes_the_layers_of_its_range() -> None:
    (proposal,) = mutations('{"parent": 2, "changes": [{"first": 2, "last": 1, "points": -5}]}')
    before = MEMBERS[1].candidate
    change = [new - old for new, old in zip(proposal.rates, before.rates, strict=True)]
    assert change == pytest.approx([0, -0.05, -0.05, 0])
    assert proposal.parents == (before.id,)


def test_a_mix_takes_its_range_from_the_second_parent() -> None:
    (proposal,) = mixes('{"parents": "3+1", "first": 1, "layers": 2}')
    base, donor = MEMBERS[2].candidate, MEMBERS[0].candidate
    assert proposal.rates == (base.rates[0], *donor.rates[1:3], base.rates[3])
    assert proposal.parents == (base.id, donor.id)


@pytest.mark.parametrize(
    ("pair", "first", "layers"),
    [
        *(("1+2", first, layers) for first, layers in ((0, 4), (0, 99), (-1, 2), (4, 1), (1, 0), (10**30, 1))),
        *((pair, 1, 2) for pair in ("1+1", "1+9", "1", "١+٢", "1+2+3", "-1+2", "1 + 2 ")),
    ],
)
def test_a_mix_has_layers_of_two_different_parents(pair: str, first: int, layers: int) -> None:
    with pytest.raises(InvalidReply):
        mixes(json.dumps({"parents": pair, "first": first, "layers": layers}))


def test_a_choice_that_repeats_itself_is_filled_up_with_the_best() -> None:
    assert choices('{"parents": [3, 2, 3, 3]}', 3) == (MEMBERS,)


@pytest.mark.parametrize(
    "text",
    [
        '{"profile": [10]}',
        '{"profile": [10, 101]}',
        '{"profile": [10.5, 20]}',
        '{"profile": [true, 20]}',
        '{"profile": ["10", "20"]}',
        '{"attention": [10, 20], "mlp": [10, 20]}',
        '{"profile": null}',
        '{"proposals": []}',
        "{}",
        "[]",
    ],
)
def test_what_is_not_a_profile_is_refused(text: str) -> None:
    with pytest.raises(InvalidReply):
        profiles(text)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_every_accepted_list_can_be_given_its_exact_mean(rates: list[float]) -> None:
    try:
        accepted = lists(json.dumps(rates))[0]
    except InvalidReply:
        return
    _has_exact_mean(accepted)


@given(st.lists(st.integers(0, 100), min_size=2, max_size=12))
def test_every_profile_can_be_given_its_exact_mean(points: list[int]) -> None:
    _has_exact_mean(profiles(json.dumps({"profile": points}))[0].rates)


def _has_exact_mean(rates: tuple[float, ...]) -> None:
    feasible = SPEC.feasible(rates, SHAPE)
    assert abs(weighted_mean(feasible, [u.parameters for u in SHAPE.units("layer")]) - SPEC.rate) < 1e-9
