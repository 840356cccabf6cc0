"""Grammars made from schemas: they match exactly the texts without blanks that match the schema."""

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.llm.grammar import compact_grammar
from tests.agents.prompting.test_prompts import view_of
from tests.support.asked import ASKED
from tests.support.schema_answers import value_of

WORDS = ("mlp 0", "attention 12", 'with "quotes"', "back\\slash", "1+2", "^a", "-a", "]a", "")
integers = st.tuples(st.integers(-30, 200), st.integers(0, 120)).map(
    lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
)
enums = st.lists(st.sampled_from((*WORDS, -20, -5, 5, 15)), min_size=1, unique=True).map(lambda words: {"enum": words})


def arrays(items: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda item, fewest, more: {"type": "array", "items": item, "minItems": fewest, "maxItems": fewest + more},
        items,
        st.integers(0, 3),
        st.integers(0, 3),
    )


def objects(items: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(["first", "last", "block"]), items, min_size=1).map(
        lambda properties: {"type": "object", "properties": properties, "required": list(properties)}
    )


schemas = st.recursive(integers | enums, lambda items: arrays(items) | objects(items), max_leaves=6)


PART = re.compile(
    r'(?P<literal>"(?:\\["\\]|[^"\\])*")|(?P<rule>part\d+)|'
    r"(?P<same>\[(?:\\x[0-9A-F]{2}|\w)*\]|\{\d+,\d+\}|[()|?])|(?P<blanks> +)"
)


def matcher(schema: dict[str, Any]) -> re.Pattern[str]:
    """The grammar as a regular expression, which it can be: no rule uses itself."""
    grammar = compact_grammar(schema)
    assert grammar is not None
    rules = dict(line.split(" ::= ", 1) for line in grammar.splitlines())

    def expanded(body: str) -> str:
        """A literal's characters as they are, a rule's body, and what is written alike in both."""
        done, at = "", 0
        while at < len(body):
            found = PART.match(body, at)
            assert found, f"no part of a grammar: {body[at:]}"
            at = found.end()
            if literal := found["literal"]:
                done += re.escape(re.sub(r"\\(.)", r"\1", literal[1:-1]))
            elif rule := found["rule"]:
                done += f"(?:{expanded(rules[rule])})"
            else:
                done += found["same"] or ""
        return done

    return re.compile(expanded(rules["root"]))


def compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@given(schemas, st.integers(0, 1000))
def test_texts_without_blanks_match_the_grammar_if_they_match_the_schema(schema: dict[str, Any], seed: int) -> None:
    value = value_of(schema, random.Random(seed))
    text = compact(value)
    assert matcher(schema).fullmatch(text)
    spaced = json.dumps(value, indent=1)
    assert spaced == text or not matcher(schema).fullmatch(spaced)


@given(integers)
def test_a_range_of_integers_is_that_range(schema: dict[str, Any]) -> None:
    fits = matcher(schema).fullmatch
    low, high = schema["minimum"], schema["maximum"]
    assert [n for n in range(low - 30, high + 30) if fits(str(n))] == list(range(low, high + 1))
    assert not fits(f"0{high}") and not fits(f"{high}.5") and not fits("")


@given(enums)
def test_an_enum_is_its_values(schema: dict[str, Any]) -> None:
    fits = matcher(schema).fullmatch
    assert {value for value in (*WORDS, -20, -5, 5, 15) if fits(json.dumps(value))} == set(schema["enum"])
    assert not fits('"mlp"') and not fits('"mlp 01"')


def test_bounds_of_integers_need_not_be_whole() -> None:
    fits = matcher({"type": "integer", "minimum": 0.5, "maximum": 2.5}).fullmatch
    assert [n for n in range(5) if fits(str(n))] == [1, 2]


def test_decimals_keep_to_their_range_unlike_in_llama_cpps_own_grammar() -> None:
    fits = matcher({"type": "number", "minimum": 0, "maximum": 1}).fullmatch
    assert all(fits(text) for text in ("0", "0.5", "0.25", "0.125", "1", "1.0", "1.000"))
    assert not any(fits(text) for text in ("-1", "-0.1", "1.1", "1000", "2", ".5", "0.1250", "0.", "1e3"))
    narrow = matcher({"type": "number", "minimum": 0.1, "maximum": 0.95}).fullmatch
    texts = ("0", "0.05", "0.1", "0.10", "0.95", "0.951", "1")
    assert [text for text in texts if narrow(text)] == ["0.1", "0.10", "0.95"]


def test_arrays_are_as_long_as_they_may_be() -> None:
    schema = {"type": "array", "items": {"enum": [5]}, "minItems": 0, "maxItems": 3}
    texts = [compact([5] * n) for n in range(5)]
    assert [bool(matcher(schema).fullmatch(text)) for text in texts] == [True, True, True, True, False]
    schema["minItems"] = 2
    assert [bool(matcher(schema).fullmatch(text)) for text in texts] == [False, False, True, True, False]
    none = {**schema, "minItems": 0, "maxItems": 0}
    assert [bool(matcher(none).fullmatch(text)) for text in texts[:2]] == [True, False]


def test_an_object_is_whole() -> None:
    fits = matcher(
        {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [2]}}, "required": ["a", "b"]}
    ).fullmatch
    assert fits('{"a":1,"b":2}')
    parts = ('{"a":1}', '{"b":2}', '{"b":2,"a":1}', "{}")
    assert not any(map(fits, (*parts, '{"a":1,"b":2,"a":1}', '{"a":1"b":2}', '{"a":1,"b":2', '{"a":1,"b":2}}')))


@pytest.mark.parametrize(
    "unknown",
    [
        {"type": "string"},
        {"type": "array", "items": {"enum": [1]}, "minItems": 1},
        {"type": "integer", "minimum": 0},
        {"type": "integer", "minimum": 0, "maximum": 10**9},
        {"type": "number", "minimum": -1, "maximum": 1},
        {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [1]}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        {"type": "object", "properties": {}, "required": []},
        {"anyOf": [{"enum": [1]}]},
        {"enum": []},
        {"enum": ["x" * 5000]},
        {"enum": [{1, 2}]},
        {"type": "integer", "minimum": 5, "maximum": 4},
        {"type": "integer", "minimum": None, "maximum": 4},
        {"type": "number", "minimum": 0.1234, "maximum": 0.1235},
        {"type": "array", "items": {"enum": [1]}, "minItems": 3, "maxItems": 1},
        {"type": "array", "items": True, "minItems": 1, "maxItems": 1},
    ],
)
def test_unsupported_schemas_have_no_grammar(unknown: dict[str, Any]) -> None:
    assert compact_grammar(unknown) is None


@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("asked", ASKED)
def test_all_that_agents_ask_for_has_a_grammar(asked: str, granularity: Any) -> None:
    schema = ASKED[asked](view_of(granularity))
    fits = matcher(schema).fullmatch
    for seed in range(20):
        value = json.loads(
            json.dumps(value_of(schema, random.Random(seed))), parse_float=lambda text: round(float(text), 3)
        )
        assert fits(compact(value))
