"""Rules: what they compute, and that no text breaks their reader."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import RuleError
from protocol.plans.allocation import Allocation, DenseMeasurements, allocation_rates
from protocol.plans.features import FEATURES, unit_features
from protocol.plans.rule import LARGEST, MAX_CHARACTERS, MAX_NODES, Rule
from tests.support.samples import SHAPE

SENSIBLE = "rate - a*attention - 0.1*sensitivity with a = 0.4"
FEATURES_OF_TWO = dict.fromkeys(FEATURES, (0.0, 1.0)) | {"rate": (0.3, 0.3), "depth": (0.25, -4.0)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SENSIBLE, (0.3, 0.3 - 0.4 - 0.1)),
        ("0.5", (0.5, 0.5)),
        ("-depth*2 + 1/4", (-0.25, 8.25)),
        ("depth - 1 - 2", (-2.75, -7.0)),
        ("2*(depth + -1)", (-1.5, -10.0)),
        ("8/2/4", (1.0, 1.0)),
        ("min(depth, rate) + max(depth, 0)", (0.25 + 0.25, -4.0)),
        ("where(depth < 0, 1, 2)", (2.0, 1.0)),
        ("where(depth > 0, rate, x) with x = -1e-1", (0.3, -0.1)),
        ("abs(depth) + sqrt(depth)", (0.25 + 0.5, 4.0 + 2.0)),
        ("log(exp(depth))", (0.25, -4.0)),
        ("tanh(0*depth)", (0.0, 0.0)),
    ],
)
def test_a_rule_computes_a_value_of_each_unit(text: str, expected: tuple[float, ...]) -> None:
    rule = Rule.parse(text)
    assert rule.values(FEATURES_OF_TWO) == pytest.approx(expected)
    assert Rule.parse(str(rule)).values(FEATURES_OF_TWO) == rule.values(FEATURES_OF_TWO)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("rate+-0.5*depth", "rate - 0.5*depth"),
        ("rate - (-0.5)*depth", "rate + 0.5*depth"),
        ("exp(-0.3*sensitivity)*2", "exp(-0.3*sensitivity)*2"),
        ("-0.3*depth + rate", "(-0.3*depth) + rate"),
        ("2*-3", "2*(-3)"),
        ("1 - (2 - (3 - 4))", "1 - (2 - (3 - 4))"),
        ("a/(b*c)/d with a = 1, b = 2, c = 3, d = 4", "1/(2*3)/4"),
        ("0.123456*rate", "0.1235*rate"),
    ],
)
def test_a_rule_prints_as_a_person_would_write_it(text: str, printed: str) -> None:
    assert str(Rule.parse(text)) == printed


@pytest.mark.parametrize(
    "text", ["1/(depth - depth)", "log(0)", "exp(exp(exp(size*1000)))", "-1000*1000*1000*1000*size"]
)
def test_a_rule_has_a_value_on_all_inputs(text: str) -> None:
    values = Rule.parse(text).values({"depth": (0.0, math.inf), "size": (math.nan, 1e300)})
    assert all(abs(value) <= LARGEST for value in values)


REFUSED = {
    "": "needs a number or a name before the end",
    "__import__('os').system('id')": 'cannot contain "\'"',
    "__import__(os)": "'__import__' is no function of rules",
    "depth; import os": "cannot contain ';'",
    "depth.real": "cannot contain '.'",
    "[depth]": "cannot contain '['",
    "lambda: 1": "cannot contain ':'",
    "depth ** 9": "needs a number or a name before '*'",
    "depth rate": "cannot go on with 'rate'",
    "depth)": "cannot go on with ')'",
    "(depth": "needs ')' before the end",
    "log": "'log' is neither a feature nor a constant",
    "log()": "needs a number or a name before ')'",
    "log(depth, 2)": "log takes 1 arguments, not 2",
    "min(depth)": "min takes 2 arguments, not 1",
    "where(depth, 1, 2)": "where compares first",
    "depth < 1": "cannot go on with '<'",
    "layer7": "'layer7' is neither a feature nor a constant of the rule: the features are rate, attention",
    "1001*depth": "the number '1001' of a rule is larger than 1000",
    "1e999": "larger than 1000",
    "a with a = nan": "given as name = number",
    "a with a = inf": "given as name = number",
    "a with a = 1, a": "given as name = number, not as 'a'",
    "a with a = 1e9": "the number 'a' of a rule is larger than 1000",
    "a with a = 1..2": "given as name = number",
    "depth with a = 1": "gives the constant 'a' a value, but does not use it",
    "rate with rate = 1": "'rate' cannot be a constant",
    "+".join(["depth"] * 21): f"at most {MAX_NODES} numbers",
    "-" * 500 + "depth": f"nested at most {MAX_NODES} deep",
    "(" * 500: f"nested at most {MAX_NODES} deep",
    "log(" * 50 + "depth" + ")" * 50: f"nested at most {MAX_NODES} deep",
    "depth" + "0" * MAX_CHARACTERS: f"at most {MAX_CHARACTERS} characters",
    "x" * 200: "'" + "x" * 37 + "…' is neither",
    "dépth": "cannot contain 'é'",
    "depth\x00": "cannot contain",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text)[:30])
def test_any_other_text_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(RuleError, match=re.escape(REFUSED[text])) as error:
        Rule.parse(text)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


words = st.sampled_from(
    [*FEATURES, "a", "b", "log", "where", "min", "with", "=", "1", ".5", "1e3", "1e308", *"+-*/(),<>=;'"]
)


@given(st.lists(words, max_size=60).map(" ".join) | st.text(max_size=300))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        rule = Rule.parse(text)
    except RuleError:
        return
    assert all(map(math.isfinite, rule.values(FEATURES_OF_TWO)))


def test_a_feature_that_was_not_measured_is_named() -> None:
    with pytest.raises(RuleError, match="needs the feature fit_error, which was not measured"):
        Rule.parse("rate - fit_error").values(unit_features(SHAPE, 0.3, "block", {"sensitivity": [1.0] * 8}))


def test_measured_features_are_compared_within_their_kind() -> None:
    features = unit_features(SHAPE, 0.3, "block", {"sensitivity": [1, 10, 10, 10, 10, 10, 100, 10]})
    low, high = -math.sqrt(2), math.sqrt(2)
    assert features["sensitivity"] == pytest.approx([low, 0, 0, 0, 0, 0, high, 0])
    assert features["attention"] == (1, 0) * 4 and features["mlp"] == (0, 1) * 4
    assert features["depth"] == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert features["first"] == (1, 1, 0, 0, 0, 0, 0, 0) and features["last"] == (0, 0, 0, 0, 0, 0, 1, 1)
    assert sum(features["size"]) == pytest.approx(8) and features["rate"] == (0.3,) * 8
    assert not {"weight", "least_damage"} & set(features)


def test_the_least_damage_is_what_the_allocation_by_sensitivity_gives() -> None:
    measured = {"sensitivity": [0.1, 0.2, 0.4, 0.1, 0.3, 0.2, 0.1, 0.5], "removed": [0.3] * 8}
    findings = DenseMeasurements(sensitivity=measured["sensitivity"], removed=measured["removed"], features=measured)
    rule = Allocation(method="rule", rule=Rule.parse("least_damage"))
    expected = allocation_rates(Allocation(method="sensitivity"), findings, SHAPE, 0.3, "block")
    assert allocation_rates(rule, findings, SHAPE, 0.3, "block") == pytest.approx(expected)
