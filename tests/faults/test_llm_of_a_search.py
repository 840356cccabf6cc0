"""A launched search with a real server and an instant worker, whose LLM is down, wrong, over budget or replayed."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from daemon.launch.launch import Launch
from daemon.monitor.remote import RemoteSearch
from daemon.monitor.status import Condition
from daemon.monitor.summary import Summary
from daemon.settings.llm import EndpointSettings
from daemon.settings.settings import Settings
from daemon.settings.sources import load
from daemon.state.history import History, load_history
from protocol.errors import SettingsError, UsageError
from protocol.plans.candidate import Measured
from protocol.plans.profile import ModelProfile
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from tests.faults.marks import fault
from tests.support.conducted import unevenness
from tests.support.samples import profile_for
from tests.support.schema_answers import value_of
from tests.support.scripted_llm import Handler, Reply, ScriptedLlm, hangs, lists_models, refuses
from tests.support.servers import Server, eventually

CANDIDATES = 4 + 2 * (3 + 2)
NOWHERE = EndpointSettings(base_url="http://127.0.0.1:9/v1", model="model", name="nowhere")


def answers(body: dict[str, Any]) -> str:
    """Return a random answer in the requested form."""
    if "response_format" not in body:
        return "yes"
    return json.dumps(value_of(body["response_format"]["json_schema"]["schema"], random.Random(body["seed"])))


class Daemon:
    """`selfpruner daemon` on `server`, run after run, in one process with its instant workers."""

    def __init__(self, redis: Redis, server: Server, folder: Path) -> None:
        self.redis, self.server, self.folder = redis, server, folder

    def settings(self, *overrides: str, name: str = "s") -> Settings:
        common = ["target.model=tiny", "target.rate=0.3", f"run.folder={self.folder}", f"search.name={name}"]
        common += ["search.population=4", "search.mutations=3", "search.crossovers=2", "search.rounds=2"]
        common += ["llm.reply=edits", "llm.deadline_seconds=20", "llm.start_wait_seconds=0.2"]
        return load(None, [*common, *overrides])

    async def run(self, endpoints: Sequence[EndpointSettings], *overrides: str, name: str = "s") -> Summary:
        settings = self.settings(*overrides, name=name)
        launch = Launch(settings, self.server.url, endpoints, embedded=False)
        profile = profile_for(settings.spec())
        async with instant_worker(self.redis, Keys(name), profile), asyncio.timeout(100):
            summary = await launch.run()
        assert summary is not None
        return summary

    async def history(self, name: str = "s") -> History:
        return await load_history(self.redis, Keys(name))

    async def condition(self, name: str = "s") -> Condition:
        """Return the condition that other processes read."""
        client: Any = self.redis
        return Condition.model_validate_json(await client.get(Keys(name).condition))

    def transcript(self, name: str = "s") -> Path:
        return self.folder / name / "transcript.jsonl"


@asynccontextmanager
async def instant_worker(redis: Redis, keys: Keys, profile: ModelProfile) -> AsyncIterator[None]:
    """Publishes the profile and measures at once."""
    client: Any = redis
    await client.set(keys.profile, profile.model_dump_json(), nx=True)
    jobs = JobQueue(redis, keys, "instant", lease_seconds=30)

    async def work() -> None:
        while True:
            if job := await jobs.claim():
                await jobs.commit(job, unevenness(job.candidate))

    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture
def daemon(redis: Redis, server: Server, tmp_path: Path) -> Daemon:
    return Daemon(redis, server, tmp_path)


def settings_of(llm: ScriptedLlm, **more: Any) -> EndpointSettings:
    return EndpointSettings.model_validate({"base_url": llm.base_url, "model": "model", "name": llm.name, **more})


# Away


@fault("38", "the LLM is away for the whole search", "a closed port", "fallbacks go on, degraded")
async def test_a_search_without_any_llm_uses_the_fallback_and_says_so(daemon: Daemon) -> None:
    with capture_logs() as logs:
        summary = await daemon.run([NOWHERE])
    assert summary.finished and summary.candidates["by_source"] == {"llm": 0, "fallback": CANDIDATES}
    condition = await daemon.condition()
    assert condition.degraded and condition.degraded_by == "endpoints"
    assert condition.endpoints["nowhere"].state == "left alone"
    status = await RemoteSearch(daemon.redis, Keys("s"), daemon.settings().spec()).status()
    assert (status.degraded, status.degraded_by) == (True, "endpoints")
    told = [line["event"] for line in logs if line["log_level"] in ("warning", "error")]
    assert sorted(event for event in told if event.startswith(("endpoint", "llm"))) == [
        "endpoint_down",
        "endpoint_not_ready",
        "llm_degraded",
    ]


async def test_an_endpoint_that_comes_back_is_used_again_and_the_state_says_so(daemon: Daemon) -> None:
    broken = 6

    def comes_back(body: dict[str, Any]) -> str | Handler:
        return refuses(500, "broken") if len(llm.asked) <= broken else answers(body)

    async with ScriptedLlm(comes_back) as llm:
        summary = await daemon.run([settings_of(llm)], "llm.rest_seconds=0.001", "llm.concurrency=1")
    assert summary.candidates["by_source"]["fallback"] and summary.candidates["by_source"]["llm"]
    condition = await daemon.condition()
    assert not condition.degraded and condition.endpoints["fake"].state == "asked"


@fault("35", "the LLM is not there at the start", "started late", "seeds are measured, then it is asked")
async def test_a_search_waits_at_its_start_for_an_endpoint_that_is_not_there_yet(daemon: Daemon) -> None:
    async with ScriptedLlm() as llm:
        port, endpoint = llm.port, settings_of(llm)
    running = asyncio.create_task(daemon.run([endpoint], "llm.start_wait_seconds=60"))
    await asyncio.sleep(2)
    condition = await daemon.condition()
    assert condition.awaited is not None and condition.awaited.reason.startswith("fake: ")
    assert {each.provenance.source for each in (await daemon.history()).ledger.values()} == {"allocation"}
    async with ScriptedLlm(answers, port=port):
        summary = await running
    assert summary.candidates["by_source"]["llm"] > CANDIDATES / 2


@fault("35", "the LLM comes late and refuses the key", "401", "refused, and refused again when run again")
async def test_an_endpoint_that_comes_late_and_refuses_the_key_ends_the_search_each_time(daemon: Daemon) -> None:
    async with ScriptedLlm() as llm:
        port, endpoint = llm.port, settings_of(llm)
    running = asyncio.create_task(daemon.run([endpoint], "llm.start_wait_seconds=60", "search.seeds=[uniform]"))
    await eventually(partial(_has_candidates, daemon), 20)
    async with ScriptedLlm(models=[refuses(401, "wrong key")] * 9, port=port) as llm:
        with pytest.raises(UsageError, match="refuses the key"):
            await running
        with pytest.raises(UsageError, match="refuses the key"):
            await daemon.run([endpoint], "llm.start_wait_seconds=60", "search.seeds=[uniform]")


async def _has_candidates(daemon: Daemon) -> bool:
    return bool((await daemon.history()).ledger)


@fault("34", "the LLM asks to be left alone", "Retry-After 300", "one request, fallbacks go on")
async def test_a_long_wait_that_an_endpoint_asks_for_does_not_hold_up_the_search(daemon: Daemon) -> None:
    limited = refuses(429, "slow down", headers={"retry-after": "300"})
    async with ScriptedLlm([limited]) as llm:
        summary = await daemon.run([settings_of(llm)], "llm.concurrency=1")
        assert len(llm.asked) == 1
    assert summary.finished and summary.candidates["by_source"]["fallback"] == CANDIDATES
    assert (await daemon.condition()).degraded_by == "endpoints"


# Wrong


@pytest.mark.parametrize(
    ("script", "models", "sentence"),
    [
        ([refuses(404, "The model `model` does not exist.")], lists_models("gpt-4o"), "it knows gpt-4o"),
        ([refuses(401, "no")], refuses(401, "no"), "refuses the key"),
    ],
)
async def test_an_endpoint_that_will_never_answer_is_refused_before_the_search_begins(
    daemon: Daemon, script: list[Handler], models: Reply, sentence: str
) -> None:
    async with ScriptedLlm(script, models=[models]) as llm:
        with pytest.raises(SettingsError, match=sentence):
            await daemon.run([settings_of(llm)])
    history = await daemon.history()
    assert not history.ledger


@fault("34", "the LLM's quota is used up", "insufficient_quota amid the search", "it rests, fallbacks go on")
async def test_a_quota_used_up_within_a_search_ends_the_requests_and_not_the_search(daemon: Daemon) -> None:
    quota = refuses(429, "You exceeded your current quota", code="insufficient_quota")

    def answers_five(body: dict[str, Any]) -> str | Handler:
        return quota if len(llm.asked) > 5 else answers(body)

    async with ScriptedLlm(answers_five) as llm:
        summary = await daemon.run([settings_of(llm)], "llm.concurrency=1")
        assert len(llm.asked) == 6
    assert summary.finished and summary.candidates["by_source"]["fallback"]
    condition = await daemon.condition()
    assert condition.degraded_by == "endpoints" and condition.endpoints["fake"].state == "left alone"
    assert "quota" in str(condition.endpoints["fake"].reason)


# Spent


async def test_a_budget_holds_over_restarts_and_the_state_says_that_it_is_used_up(daemon: Daemon) -> None:
    async with ScriptedLlm(answers) as llm:
        endpoint = settings_of(llm, price_in=1.0, price_out=2.0)
        summary = await daemon.run([endpoint], "llm.budget_requests=4", "llm.concurrency=1")
        assert summary.finished and len(llm.asked) == 4
        assert (await daemon.condition()).degraded_by == "budget"
        counters = (await daemon.history()).counters
        assert counters["requests"] == 4
        assert counters["cost"] == pytest.approx((4 * 10 * 1.0 + 4 * 5 * 2.0) / 1e6)
        longer = await daemon.run([endpoint], "llm.budget_requests=4", "search.rounds=3")
        assert longer.candidates["by_agent"]["mutator"] == 9 and len(llm.asked) == 4
        await daemon.run([endpoint], "llm.budget_requests=6", "search.rounds=4", "llm.concurrency=1")
        assert len(llm.asked) == 6


async def test_what_was_spent_is_kept_when_the_daemon_is_killed(daemon: Daemon) -> None:
    def answers_two(body: dict[str, Any]) -> str | Handler:
        return hangs if len(llm.asked) > 2 else answers(body)

    async with ScriptedLlm(answers_two) as llm:
        running = asyncio.create_task(daemon.run([settings_of(llm)], "llm.concurrency=1"))
        await eventually(lambda: len(llm.asked) == 3)

        async def is_counted() -> bool:
            return (await daemon.history()).counters.get("prompt_tokens") == 20

        await eventually(is_counted, 3)  # nothing but the answers makes this happen before the next tick
        running.cancel()
        await asyncio.wait({running})


async def test_a_search_ends_cleanly_when_its_hours_are_used_up(daemon: Daemon) -> None:
    async with ScriptedLlm(answers) as llm:
        with capture_logs() as logs:
            summary = await daemon.run([settings_of(llm)], "search.rounds=100000", "search.budget_hours=0.0005")
        assert summary.finished and 4 <= sum(summary.candidates["by_agent"].values()) < 10_000  # of 200,000
        history = await daemon.history()
        assert {e.candidate.id for e in history.population} == set(history.ledger)
        assert [line["event"] for line in logs].count("search_hours_used_up") == 1
        asked = len(llm.asked)
        again = await daemon.run([settings_of(llm)], "search.rounds=100000", "search.budget_hours=0.0005")
        assert again.candidates == summary.candidates and len(llm.asked) == asked


# Replayed


def made(history: History) -> list[tuple[Any, ...]]:
    """Return the candidates in order, with their source and measurement."""
    perplexities = {e.candidate.id: e.outcome.perplexity for e in history.population if isinstance(e.outcome, Measured)}
    return [(c.id, c.rates, c.provenance, perplexities[c.id]) for c in history.ledger.values()]


async def test_a_search_is_replayed_from_its_transcript_without_an_endpoint(daemon: Daemon) -> None:
    async with ScriptedLlm(answers) as llm:
        await daemon.run([settings_of(llm)])
    replay = (f"llm.replay={daemon.transcript()}", "llm.replay_strict=true")
    summary = await daemon.run([], *replay, name="again")
    assert made(await daemon.history("again")) == made(await daemon.history())
    assert summary.tokens == {"prompt": 0, "completion": 0}


async def test_a_daemon_killed_within_a_round_asks_nothing_twice(daemon: Daemon) -> None:
    killed = False

    def hangs_until_killed(body: dict[str, Any]) -> str | Handler:
        return hangs if len(llm.asked) > 7 and not killed else answers(body)

    async with ScriptedLlm(hangs_until_killed) as llm:
        running = asyncio.create_task(daemon.run([settings_of(llm)], "llm.concurrency=1"))
        await eventually(lambda: len(llm.asked) == 8)
        await asyncio.sleep(0.3)  # so that what was answered is enqueued
        running.cancel()
        await asyncio.wait({running})
        killed = True
        await daemon.run([settings_of(llm)])
        bodies = [json.dumps([asked.body["messages"], asked.body["seed"]]) for asked in llm.asked]
    assert len(set(bodies)) == len(bodies) - 1  # only the question that had no answer yet
    await daemon.run([], f"llm.replay={daemon.transcript()}", "llm.replay_strict=true", name="again")
    assert made(await daemon.history("again")) == made(await daemon.history())


async def test_a_new_search_in_the_folder_of_an_old_one_puts_its_transcript_aside(daemon: Daemon) -> None:
    async with ScriptedLlm(answers) as llm:
        await daemon.run([settings_of(llm)], "search.rounds=0")
        old = daemon.transcript().read_text()
        await daemon.redis.flushall()
        (daemon.folder / "s" / "evaluations.jsonl").unlink()  # from which the old one would come back
        asked = len(llm.asked)
        await daemon.run([settings_of(llm)], "search.rounds=0")
        assert len(llm.asked) == 2 * asked
    assert (daemon.folder / "s" / "transcript.1.jsonl").read_text() == old
    assert len(daemon.transcript().read_text().splitlines()) == len(old.splitlines())
