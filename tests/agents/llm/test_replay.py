"""A search replayed from its transcript has the same history, with any delays and after any kill."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from agents.llm.chat import Chat
from agents.llm.endpoint import Answer, ChatClient, Question
from agents.llm.replay import CachedChat, Replay, Transcript, Unanswered
from daemon.launch.llm import read_replay, read_transcript
from daemon.search.modes import rounds_of
from daemon.search.search import Search
from daemon.settings.sources import load
from protocol.errors import EndpointError, SettingsError, first_error
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from tests.support.chatting import QUICK, quick
from tests.support.conducted import SETTINGS, Conducted, unevenness
from tests.support.schema_answers import value_of
from tests.support.scripted_llm import Handler, ScriptedLlm, refuses

pytestmark = pytest.mark.one_server

Record = dict[str, Any]
LONGER = SETTINGS.model_copy(update={"population": 6, "mutations": 4, "crossovers": 3, "rounds": 3})


def record(text: str | None, *, content: str = "Which?", label: str = "first", **more: Any) -> Record:
    """A record of a transcript."""
    return {
        "label": label,
        "endpoint": "fake",
        "messages": [{"role": "user", "content": content}],
        "text": text,
        "error": None,
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "seconds": 0.1,
        **more,
    }


def question(content: str, label: str = "first") -> Question:
    messages = [{"role": "user", "content": content}]
    return Question(messages, None, "", seed=0, temperature=1.0, max_tokens=10, label=label)


# The transcript


def test_an_answer_is_found_by_its_label_and_its_messages() -> None:
    transcript = Transcript([record("one"), record("two", label="second"), record("three", content="What?")])
    found = transcript.find(question("Which?"))
    assert found == Answer("one", "fake", 10, 5, 0.1, "stop")
    assert isinstance(two := transcript.find(question("Which?", "second")), Answer) and two.text == "two"
    assert transcript.find(question("What?", "second")) is None


def test_the_endpoint_that_answered_counts_else_that_none_did() -> None:
    failed = record(None, error="broken")
    none = record(None, endpoint=None, error="no LLM endpoint answered")
    for records, expected in (
        ([failed, record("fine")], Answer("fine", "fake", 10, 5, 0.1, "stop")),
        ([failed, none], Unanswered("no LLM endpoint answered")),
        ([failed], Unanswered("broken")),
        ([none, record("fine")], Answer("fine", "fake", 10, 5, 0.1, "stop")),
        ([record("fine"), failed], Answer("fine", "fake", 10, 5, 0.1, "stop")),
    ):
        assert Transcript(records).find(question("Which?")) == expected


@pytest.mark.parametrize(
    "bad", [{}, {"label": "first"}, record("x", messages=None), record("x", messages=[1]), record("x", seconds="soon")]
)
def test_malformed_records_are_skipped(bad: Record) -> None:
    assert len(Transcript([bad])) == 0


def test_lines_that_a_kill_left_incomplete_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "transcript.jsonl"
    whole = json.dumps(record("one"))
    file.write_text(whole[:50] + "\n" + whole + "\n[]\n" + whole[:30])
    with capture_logs() as logs:
        assert len(read_transcript(file)) == 1
    assert logs[0]["lines"] == 2
    with pytest.raises(SettingsError, match="cannot be read"):
        read_transcript(tmp_path / "nowhere")


async def test_an_unrecorded_question_is_an_error_and_ends_a_strict_replay() -> None:
    transcript = Transcript([record("one"), record(None, label="second", endpoint=None, error="all down")])
    lenient, strict = Replay(transcript, strict=False), Replay(transcript, strict=True)
    assert (await strict.ask(question("Which?"))).text == "one"
    for replay in (lenient, strict):
        with pytest.raises(EndpointError, match="all down"):
            await replay.ask(question("Which?", "second"))
    with capture_logs() as logs, pytest.raises(EndpointError, match="does not hold"):
        await lenient.ask(question("Which?", "third"))
    assert logs == [{"event": "replay_misses", "question": "third", "log_level": "warning"}]
    with pytest.raises(SettingsError, match="'third'"):
        await strict.ask(question("Which?", "third"))


def test_a_search_does_not_replay_itself(tmp_path: Path) -> None:
    own = tmp_path / "s" / "transcript.jsonl"
    own.parent.mkdir()
    own.write_text(json.dumps(record("one")))
    common = ["target.model=tiny", "target.rate=0.3", f"run.folder={tmp_path}", f"llm.replay={own}"]
    with pytest.raises(SettingsError, match="own transcript"):
        read_replay(load(None, [*common, "search.name=s"]))
    assert read_replay(load(None, [*common, "search.name=t"])) is not None


# Whole searches


def whimsical(rng: random.Random) -> Callable[[Record], str]:
    """An LLM that never answers the same, often what it has answered before, and sometimes rubbish."""

    def answer(body: Record) -> str:
        if rng.random() < 0.2:
            return "I would rather not."
        few = random.Random(rng.randint(0, 12))
        return json.dumps(value_of(body["response_format"]["json_schema"]["schema"], few))

    return answer


class Delayed:
    """Asks with random delays."""

    def __init__(self, chat: ChatClient, rng: random.Random) -> None:
        self._chat, self._rng = chat, rng

    async def ask(self, question: Question) -> Answer:
        await asyncio.sleep(self._rng.choice((0, 0.001, 0.01)))
        answer = await self._chat.ask(question)
        await asyncio.sleep(self._rng.choice((0, 0.001, 0.01)))
        return answer


@asynccontextmanager
async def unsteady_workers(redis: Redis, keys: Keys, rng: random.Random) -> AsyncIterator[Counter[str]]:
    """Three workers, now one faster, now another; counts what they evaluated."""
    evaluated: Counter[str] = Counter()

    async def work(name: str) -> None:
        jobs = JobQueue(redis, keys, name, lease_seconds=30)
        while True:
            if job := await jobs.claim():
                await asyncio.sleep(rng.choice((0, 0.001, 0.01)))
                evaluated[job.candidate.id] += 1
                await jobs.commit(job, unevenness(job.candidate))

    tasks = [asyncio.create_task(work(f"worker{number}")) for number in range(3)]
    try:
        yield evaluated
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def history(search: Search) -> list[tuple[Any, ...]]:
    """Every candidate in the order of its making, who made it, and what was measured."""
    made = []
    for candidate in search.state.ledger.values():
        evaluation = search.state.population.get(candidate.id)
        assert evaluation is not None
        made.append((candidate.id, candidate.rates, candidate.provenance, evaluation.outcome))
    return made


async def searched(redis: Redis, keys: Keys, folder: Path, chat: ChatClient, seed: int) -> Search:
    """A search to its end, with delays of that seed; in an empty server."""
    await redis.flushall()
    rng = random.Random(seed)
    async with unsteady_workers(redis, keys, rng):
        return await Conducted(redis, keys, folder, settings=LONGER, chat=Delayed(chat, rng)).run()


def into(records: list[Record]) -> Callable[[dict[str, object]], None]:
    """What a transcript's file does with a record."""
    return lambda entry: records.append(json.loads(json.dumps(entry)))


async def recorded(redis: Redis, keys: Keys, folder: Path, seed: int) -> tuple[Search, list[Record]]:
    """A search with a whimsical LLM, and its transcript."""
    records: list[Record] = []
    async with (
        ScriptedLlm(whimsical(random.Random(seed))) as llm,
        Chat([llm.endpoint], QUICK, record=into(records)) as chat,
    ):
        return await searched(redis, keys, folder, chat, seed), records


async def killed_now_and_then(
    redis: Redis, keys: Keys, folder: Path, make_chat: Callable[[], ChatClient], seed: int
) -> tuple[Search, int]:
    """A search that is killed every few candidates; and how often it was."""
    await redis.flushall()
    rng = random.Random(seed)
    kills = 0
    while True:
        conducted = Conducted(redis, keys, folder, settings=LONGER, chat=Delayed(make_chat(), rng))
        search = await conducted.open()
        enough = len(search.state.ledger) + rng.randint(1, 5)
        async with unsteady_workers(redis, keys, rng):
            running = asyncio.create_task(search.run(rounds_of(search.settings)))
            async with asyncio.timeout(60):
                while not running.done() and len(search.state.ledger) < enough:
                    await asyncio.sleep(0.001)
            killed = not running.done()
            running.cancel()
            await asyncio.wait({running})
        conducted.journal.close()
        if not killed:
            running.result()
            return search, kills
        kills += 1


async def test_a_replayed_search_has_the_same_history_with_any_delays(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    for seed in range(20, 40):  # who asks first gets the next whim, so no seed alone brings a fallback every time
        original, records = await recorded(redis, keys, tmp_path, seed)
        sources = original.state.proposals.by_source
        if sources["fallback"]:
            break
    assert sources["llm"] and sources["fallback"] and any(" attempt 1" in r["label"] for r in records)
    for seed in (2, 3):
        replay = Replay(Transcript(records), strict=True)
        replayed = await searched(redis, keys, tmp_path, replay, seed)
        assert history(replayed) == history(original)


async def test_a_replay_that_is_killed_again_and_again_has_the_same_history(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    original, records = await recorded(redis, keys, tmp_path, seed=4)
    transcript = Transcript(records)
    search, kills = await killed_now_and_then(redis, keys, tmp_path, lambda: Replay(transcript, strict=True), seed=5)
    assert kills >= 3
    assert history(search) == history(original)


async def test_a_search_killed_again_and_again_pays_for_no_answer_twice_and_can_be_replayed(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    records: list[Record] = []
    async with (
        ScriptedLlm(whimsical(random.Random(6))) as llm,
        Chat([llm.endpoint], QUICK, record=into(records)) as chat,
    ):
        search, kills = await killed_now_and_then(
            redis, keys, tmp_path, lambda: CachedChat(chat, Transcript(records)), seed=7
        )
    assert kills >= 3
    answered = [(r["label"], json.dumps(r["messages"])) for r in records if r["text"] is not None]
    assert len(set(answered)) == len(answered)
    replayed = await searched(redis, keys, tmp_path, Replay(Transcript(records), strict=True), seed=8)
    assert history(replayed) == history(search)


async def test_a_search_whose_transcript_is_lost_still_makes_the_right_number_of_candidates(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    async with ScriptedLlm(whimsical(random.Random(9))) as llm, Chat([llm.endpoint], QUICK) as chat:
        search, kills = await killed_now_and_then(redis, keys, tmp_path, lambda: chat, seed=10)
    assert kills >= 3
    assert search.state.proposals.by_agent == {"initializer": 6, "mutator": 12, "crossover": 9}


async def test_a_search_whose_endpoint_fails_now_and_then_is_replayed_with_its_fallbacks(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    rng, records = random.Random(11), list[Record]()
    answer = whimsical(rng)

    def fails_often(body: Record) -> str | Handler:
        return refuses(500, "broken") if rng.random() < 0.5 else answer(body)

    policy = quick(attempts=1, failures_to_open=2, rest_seconds=0.005, longest_rest=0.005)
    async with ScriptedLlm(fails_often) as llm, Chat([llm.endpoint], policy, record=into(records)) as chat:
        original = await searched(redis, keys, tmp_path, chat, seed=12)
    assert original.state.proposals.by_source["fallback"] > 3
    assert any(r["endpoint"] is None for r in records)
    replayed = await searched(redis, keys, tmp_path, Replay(Transcript(records), strict=True), seed=13)
    assert history(replayed) == history(original)


async def test_a_question_that_is_missing_in_a_strict_replay_ends_the_search_with_a_sentence(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await searched(redis, keys, tmp_path, Replay(Transcript(), strict=True), seed=14)
    error = first_error(caught.value)
    assert isinstance(error, SettingsError) and "initializer round 0" in str(error)
