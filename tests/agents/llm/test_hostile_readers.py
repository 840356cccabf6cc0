"""Every reader of what an endpoint sends takes less than a second of any text, and raises nothing but what it says.

Quadratic readers take minutes of these texts, so the bound is generous. The time is that of the reading thread: what
other processes take does not count.
"""

import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agents.llm import responses
from agents.llm.breaker import LONGEST, retry_after
from agents.llm.client import Client
from agents.llm.dialect import Dialect
from agents.llm.endpoint import Endpoint
from agents.llm.masking import Masking
from agents.llm.policy import ChatPolicy
from agents.llm.replay import Transcript
from agents.llm.responses import LONGEST_REPLY, read_completion, read_models, strip_reasoning
from agents.operators.edits import Mix, Mutation, Profile, apply_mix, apply_mutation, apply_profile
from agents.population.view import Member, View
from agents.prompting.replies import json_blocks, parse_lists, parse_objects
from agents.prompting.schemas import Choice, MixChoice, MoveChoice, apply_choice, pick
from daemon.launch.llm import read_transcript
from protocol.errors import EndpointError, InvalidReply, SettingsError
from tests.agents.llm.test_replay import record
from tests.support.hostile_replies import KINDS, WAITS, completion, odd_date
from tests.support.samples import PROFILE, SHAPE, SPEC, candidates

MAX_SECONDS = 1.0
NOW = datetime(2026, 1, 1, tzinfo=UTC)
UNITS = SHAPE.units("layer")
MEMBERS = tuple(Member(c, 20.0 + i) for i, c in enumerate(candidates(3)))
VIEW = View(SPEC, PROFILE, 1, MEMBERS)
KEY = "sk-very/secret+1234"
MB = 1024 * 1024


def in_time(read: Callable[[], object], *allowed: type[Exception]) -> None:
    """Call `read`, which may raise `allowed`, and fail if it takes too long."""
    before = time.thread_time()
    try:
        read()
    except allowed as error:
        assert len(str(error)) < 20_000
        str(error).encode("utf-8", "surrogatepass")
    assert time.thread_time() - before < MAX_SECONDS


def read_reply(text: str) -> None:
    """Everything that reads the text of an answer."""
    readings: list[Callable[[], Any]] = [
        lambda: json_blocks(text),
        lambda: parse_lists(text, UNITS, SPEC.rate, 30),
        lambda: parse_objects(text, Profile, lambda reply: apply_profile(VIEW, reply), 30),
        lambda: parse_objects(text, Mutation, lambda reply: apply_mutation(VIEW, MEMBERS, reply), 30),
        lambda: parse_objects(text, Mix, lambda reply: apply_mix(VIEW, MEMBERS, reply), 30),
        lambda: parse_objects(text, MoveChoice, lambda reply: pick("abc", reply.moves, 3, "move"), 30),
        lambda: parse_objects(text, MixChoice, lambda reply: pick("abc", [reply.mix], 1, "mix"), 30),
        lambda: parse_objects(text, Choice, lambda reply: apply_choice(MEMBERS, 2, reply), 1),
    ]
    for read in readings:
        in_time(read, InvalidReply)


def read_body(body: bytes, client: Client) -> None:
    """Everything that reads the body of a response."""
    in_time(lambda: read_completion(body, asked=100, max_tokens=100), EndpointError)
    in_time(lambda: read_models(body))
    in_time(lambda: client.masking.shown(body.decode("latin-1")))
    for status in (400, 429, 500):
        in_time(partial(failure, client, status, body[:65536]))


def failure(client: Client, status: int, body: bytes) -> None:
    """Return the client's failure for an error with this body, as the SDK passes it."""
    response = httpx2.Response(status, content=body, request=httpx2.Request("POST", "http://x/"))
    error = client._sdk._make_status_error_from_response(response)
    assert isinstance(error, openai.APIStatusError)
    failed = client._failure(error)
    assert str(failed).isprintable() and len(str(failed)) <= 300
    Dialect().learn(status, str(failed), {"seed": 1, "max_tokens": 1, "grammar": "x"})


@pytest.fixture(scope="module")
def client() -> Client:
    return Client(Endpoint("x", "http://127.0.0.1:9/v1", "model"), ChatPolicy())


PIECES = (
    *('[1,"]",', '["]",', '{"}":', '["', '[{"a":', "[x]", "[1]", "[", "]", '"', "[9e9,", "[[0.3],", "[" + "9" * 4301),
    *('{"mix": 1}', '{"parents": [1, 2]}', '{"id":"m"},', '{"message":', '{"profile":', '"proposals":', "{", "}"),
    *("<think>", "</think>", "<thinking>", "</reasoning>", "<think></thinking>", "<", "\\", '\\"', "```"),
    *("9", "-0.0", "50%", "1+2", "NaN", "true", "model ", "the model not ", "\ud800", "\x00", " ", "\n", "é", ","),
    *('{"proposals":[{"moves":["x"],', '{"layer 0":0.3,"layer 1":0.3,', "[0.3,0.3,0.3,0.3]", '{"profile":[10,20]}'),
)
PUMPED = st.builds(
    lambda before, piece, behind, length: before + piece * (1 + length // len(piece)) + behind,
    st.lists(st.sampled_from(PIECES), max_size=3).map("".join),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=3).map("".join),
    st.sampled_from((1_000, LONGEST_REPLY - 5_000 * 3)),
)
"""Hostile pieces, some of them hundreds of thousands of times."""


@given(st.one_of(PUMPED, st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
@settings(max_examples=50, deadline=None)
@example('[1,"]",' * 50_000)
@example('["]",' * 900 + "1" + "]" * 900)
@example("\n".join(f'{{"mix": {i}}}' for i in range(20_000)))
@example("[" * LONGEST_REPLY)
@example("[x]" * 130_000)
@example('{"moves": [' + '"x",' * 90_000 + "1]}")
def test_no_text_of_an_answer_takes_long_to_read(text: str) -> None:
    read_reply(text)


@given(PUMPED)
@settings(max_examples=40, deadline=None)
@example("<think>" * 300_000)
@example("<think><thinking><reasoning>" * 70_000)
@example("<think></thinking>" * 100_000)
@example("<" * 2 * MB)
def test_no_reasoning_takes_long_to_strip(text: str) -> None:
    in_time(lambda: strip_reasoning(text))
    in_time(lambda: read_completion(completion(text), asked=100, max_tokens=100))


@given(PUMPED)
@settings(max_examples=25, deadline=None)
@example('{"error": {"message": "no", "code": "' + "model " * 300_000 + '"}}')
@example('{"error": ' * 900 + "1" + "}" * 900)
@example('{"data": [' + '{"id": "m"},' * 150_000 + "{}]}")
@example("[" + "[]," * 600_000 + "[]]")
@example("9" * 2 * MB)
@example('{"choices": 0.' + "7" * 2 * MB + "}")
def test_no_body_takes_long_to_read(client: Client, text: str) -> None:
    read_body(text.encode("utf-8", "replace"), client)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name.startswith("text: ")], ids=str)
def test_every_hostile_text_is_read_in_time(kind: object, client: Client) -> None:
    body = kind.make(random.Random(1), b"").split(b"\r\n\r\n", 1)[1]  # type: ignore[attr-defined]
    read_body(body, client)
    read_reply(read_completion(body, asked=100, max_tokens=100).text)


# Waits


@given(
    st.one_of(
        st.sampled_from(WAITS), st.text(max_size=80), st.integers(0, 2**32).map(lambda n: odd_date(random.Random(n)))
    )
)
@settings(max_examples=300, deadline=None)
@example("Mon, 1 Jan 99999999999 00:00:00 GMT")
def test_no_wait_in_words_is_anything_but_a_number_of_seconds(words: str) -> None:
    for header in ("retry-after", "retry-after-ms"):
        seconds = retry_after({header: words}, NOW)
        assert seconds is None or 0 <= seconds <= LONGEST


def test_of_20000_odd_dates_none_escapes() -> None:
    rng = random.Random(0)
    dates = [odd_date(rng) for _ in range(20_000)]
    seconds = [retry_after({"retry-after": date}, NOW) for date in dates]
    assert any(s is None for s in seconds) and any(s is not None and 0 <= s <= LONGEST for s in seconds)


@given(st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()), st.lists))
@example(10**400)
def test_no_wait_in_a_body_is_anything_but_a_number_of_seconds(told: object) -> None:
    for body in ({"retry_after": told}, {"error": {"retry_after": told}}, {"error": told}, told):
        seconds = retry_after({}, NOW, body)
        assert seconds is None or 0 <= seconds <= LONGEST


# Models


@pytest.mark.parametrize("context", [10**400, 10**30, -5, 0, 1, True, 1.5, float("inf"), "many", None, [], {}])
def test_an_implausible_context_is_ignored(context: object) -> None:
    body = json.dumps({"data": [{"id": "m", "max_model_len": context, "meta": {"n_ctx": context}}]}).encode()
    assert read_models(body) == {"m": None}
    assert read_models(b'{"data": [{"id": "m", "n_ctx": %d}]}' % responses.LARGEST_CONTEXT) == {
        "m": responses.LARGEST_CONTEXT
    }


def test_a_model_whose_name_is_too_long_or_no_text_is_skipped() -> None:
    names: list[object] = ["m" * (responses.LONGEST_NAME + 1), 7, None, ["m"], {"m": 1}, True, "good"]
    assert read_models(json.dumps({"data": [{"id": name} for name in names]}).encode()) == {"good": None}


# Masking


@given(
    st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=60), st.integers(0, 3100)
)
def test_no_part_of_a_key_is_left_where_a_text_is_cut(key: str, before: int) -> None:
    """Wherever in the text it stands, also where blanks are put together."""
    shown = Masking([key]).shown("\u2588" + " " * before + key)
    assert key[:6] not in shown or key[:6] in "***"


def test_a_reason_is_one_line_that_a_terminal_may_show() -> None:
    assert Masking([]).shown("\x1b[2Ja\r\nb\x07\x00\u202ec\ud800") == "[2Ja bc"


# Transcripts


def test_a_transcript_may_hold_anything(tmp_path: Path) -> None:
    good = record("[0.3]")
    wrong: dict[str, list[object]] = {
        "seconds": [10**400, "x", [1], {"a": 1}],
        "prompt_tokens": [float("inf"), float("nan"), "x", []],
        "messages": [None, 7, "text", {"a": 1}, [1], [[]], [{"role": 1}]],
    }
    bad: list[object] = [{**good, name: value} for name, values in wrong.items() for value in values]
    bad += [[], None, 7, "text", {"label": "l"}]
    lines = [json.dumps(record).encode() for record in [*bad, good]]
    lines += [b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b'{"label": ' + b"[" * 900 + b"]" * 900 + b"}", b"\x00" * 1000]
    (tmp_path / "transcript.jsonl").write_bytes(b"\n".join(lines))
    assert len(read_transcript(tmp_path / "transcript.jsonl")) == 1


def test_a_transcript_that_is_a_device_is_refused_and_a_line_without_end_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match="'/dev/zero' cannot be read: it is not a file"):
        read_transcript(Path("/dev/zero"))
    monkeypatch.setattr("daemon.launch.llm.LONGEST_LINE", 1000)
    (tmp_path / "transcript.jsonl").write_text("x" * 10_000)
    assert len(read_transcript(tmp_path / "transcript.jsonl")) == 0


@given(
    st.recursive(
        st.one_of(st.none(), st.integers(), st.floats(), st.text()),
        lambda s: st.lists(s) | st.dictionaries(st.text(), s),
    )
)
def test_no_record_of_a_transcript_raises(told: Any) -> None:
    transcript = Transcript()
    transcript.add(told)
    for name in ("label", "messages", "text", "prompt_tokens", "seconds", "endpoint"):
        transcript.add({"label": "l", "messages": [], "endpoint": "e", "error": "x", "text": "t", name: told})
