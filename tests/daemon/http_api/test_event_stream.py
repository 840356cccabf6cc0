"""The event stream of the HTTP API: what it tells as it happens, to how many, and that the search does not feel it."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from daemon.http_api.api import MAX_EVENT_STREAMS
from daemon.monitor.event_log import EventLog
from daemon.monitor.events import Event
from daemon.monitor.observer import Observer
from daemon.monitor.status import Status
from protocol.plans.candidate import Measured
from protocol.queue.keys import Keys
from tests.support.conducted import evaluating
from tests.support.http_client import Asked, served
from tests.support.observed import Observed, every_third_fails, observed
from tests.support.servers import eventually

pytestmark = pytest.mark.one_server


async def events_of(
    ask: Asked, found: list[dict[str, Any]], last_id: str | None = None, most: int | None = None
) -> str:
    """Follow the events into `found` until the server ends them, or there are `most`; returns the last id."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    async with ask.request("/api/events", headers=headers) as response:
        assert response.status == 200 and response.content_type == "text/event-stream"
        async for line in response.content:
            if line.startswith(b"id: "):
                last_id = line.removeprefix(b"id: ").decode().strip()
            if line.startswith(b"data: "):
                found.append(json.loads(line.removeprefix(b"data: ")))
                if len(found) == most:
                    break
    return last_id or ""


async def test_events_tell_every_outcome_every_round_and_every_change_of_state(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    async with observed(redis, keys, tmp_path) as it:
        found: list[dict[str, Any]] = []
        following = asyncio.create_task(events_of(it.ask, found))
        await asyncio.sleep(0.1)
        await it.searched(every_third_fails)
        assert (await it.ask("/api/control", "POST", json={"command": "pause"}))[1]["control"] == "pause"
        it.observer.chat.degraded = "endpoints"  # type: ignore[union-attr]
        await redis.delete(keys.worker("w1"))
        await it.observer.look()
        await asyncio.sleep(0.1)
    await following
    outcomes = {e["candidate"]: e for e in found if e.get("event") in ("candidate_measured", "candidate_failed")}
    assert set(outcomes) == set(it.search.state.ledger)
    for id_, event in outcomes.items():
        evaluation = it.search.state.population.get(id_)
        assert evaluation is not None
        assert event["event"] == f"candidate_{evaluation.outcome.kind}"
        assert event["agent"] == evaluation.candidate.provenance.agent
    bests = [e["perplexity"] for e in found if e.get("is_best") is True]
    best = it.search.state.population.top(1)[0].outcome
    assert bests == sorted(bests, reverse=True) and isinstance(best, Measured)
    assert bests[-1] == pytest.approx(best.perplexity, abs=1e-6)
    Status.model_validate(found[0])
    others = [e for e in found[1:] if e["event"] not in ("candidate_measured", "candidate_failed")]
    assert {"event": "control_changed", "control": "pause"} in others
    assert {"event": "degraded_changed", "degraded": True} in others
    assert {"event": "finished_changed", "finished": True} in others
    assert {"event": "worker_left", "worker": "w1"} in others
    assert max(e["round"] for e in others if e["event"] == "round_started") == 2


async def test_a_client_that_comes_back_gets_what_it_missed_and_nothing_twice(observer: Observer, ask: Asked) -> None:
    events = [Event("round_started", {"round": number}) for number in range(6)]
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    following = asyncio.create_task(events_of(ask, first, most=2))
    await asyncio.sleep(0.1)
    observer.events.add(events[:2])
    last_id = await following
    observer.events.add(events[2:4])
    following = asyncio.create_task(events_of(ask, second, last_id, most=4))
    await asyncio.sleep(0.1)
    observer.events.add(events[4:])
    await following
    assert [e["round"] for e in first + second] == list(range(6))


async def test_a_reader_that_falls_behind_is_told_how_many_events_it_missed() -> None:
    log = EventLog(kept=3)
    reader = log.reader()
    log.add([Event("round_started", {"round": number}) for number in range(10)])
    missed, read = await reader.next(), await reader.next()
    assert missed and read
    assert [e.record for e in missed + read] == [
        {"event": "events_missed", "count": 7},
        *({"event": "round_started", "round": number} for number in (7, 8, 9)),
    ]
    known = await log.reader(read[0].id).next()
    assert known and [e.record["round"] for e in known] == [8, 9]
    for foreign in ("", "x", "other-3", "-1", "other-²"):
        first = await asyncio.wait_for(log.reader(foreign).next(), 1)
        assert first and first[0].record["round"] == 7
    log.add([Event("search_ended", {"finished": True})])
    log.close()
    last = await reader.next()
    assert last and [e.record["event"] for e in last] == ["search_ended"]
    assert await reader.next() is None


async def test_clients_that_only_listen_are_bounded_and_the_search_does_not_feel_them(
    redis: Redis, keys: Keys, it: Observed
) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        ask = Asked(it.ask.api, it.ask.url, session)
        clients = await asyncio.gather(*(ask.request("/api/events") for _ in range(MAX_EVENT_STREAMS + 8)))
        statuses = [client.status for client in clients]
        assert statuses.count(200) == MAX_EVENT_STREAMS and statuses.count(503) == 8
        assert (await it.ask("/api/status"))[0] == 200
        async with evaluating(redis, keys) as evaluated:
            await it.run()
        assert len(it.search.state.population) == 15 and set(evaluated.values()) == {1}
        for client in clients:
            client.close()

        await eventually(lambda: it.ask.api.metrics.event_streams == 0)


async def test_the_last_that_listeners_are_told_is_that_the_search_has_ended(observer: Observer) -> None:
    async with aiohttp.ClientSession() as session:
        async with served(observer) as ask:
            client = await Asked(ask.api, ask.url, session).request("/api/events")
            assert client.status == 200
            observer.finished = True
        lines = (await client.text()).splitlines()
    assert 'data: {"event":"search_ended","finished":true}' in lines


async def test_the_api_ends_within_a_second_whoever_still_listens(observer: Observer) -> None:
    async with aiohttp.ClientSession() as session:
        async with served(observer) as ask:
            clients = [await Asked(ask.api, ask.url, session).request("/api/events") for _ in range(20)]
            _, writer = await asyncio.open_connection("127.0.0.1", int(ask.url.rpartition(":")[2]))
            began = time.monotonic()
        assert time.monotonic() - began < 1
        for client in clients:
            assert b"search_ended" in await client.read()
        writer.close()
