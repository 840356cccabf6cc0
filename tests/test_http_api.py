"""The HTTP API of a real search: what it shows, what it tells as it happens, and that the search does not feel it."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis
from structlog.testing import capture_logs

from agents.endpoint import Usage
from agents.health import Degraded, EndpointState, LlmState
from daemon.changes import Event
from daemon.event_log import EventLog
from daemon.http_api import MAX_EVENT_STREAMS, HttpApi
from daemon.http_server import CannotListen
from daemon.http_token import Access
from daemon.observer import Observer
from daemon.remote import RemoteSearch, saved_status
from daemon.search import Search
from daemon.settings import HttpSettings
from daemon.status import Status
from daemon.store import History
from protocol.candidate import Candidate, Failed, Measured
from protocol.connection import connect
from protocol.control import Control
from protocol.jobs import JobQueue
from protocol.keys import Keys
from tests.http_client import Asked, nothing_yet, served
from tests.samples import CARD, SPEC
from tests.servers import Server, eventually
from tests.test_search import Conducted, evaluating, unevenness


class QuietChat:
    """What an observer sees of a Chat."""

    def __init__(self) -> None:
        self.degraded: Degraded | None = None
        self.usage = {"local": Usage(requests=7, answers=5, errors=1, prompt_tokens=900, completion_tokens=80)}

    @property
    def state(self) -> LlmState:
        return LlmState(degraded=self.degraded, endpoints=(EndpointState(name="local", state="closed"),))


class Observed:
    """A search that can be run, its observer, and its API."""

    def __init__(self, conducted: Conducted, search: Search, observer: Observer, ask: Asked) -> None:
        self.conducted, self.search, self.observer, self.ask = conducted, search, observer, ask

    async def run(self) -> None:
        async with asyncio.timeout(60):
            await self.search.run()
        self.observer.finished = True
        await self.observer.look()


@asynccontextmanager
async def observed(redis: Redis, keys: Keys, folder: Path) -> AsyncIterator[Observed]:
    """A search that has not begun yet, as Launch shows it; a worker shows signs of life."""
    conducted = Conducted(redis, keys, folder)
    search = await conducted.open()
    await redis.set(keys.card, CARD.model_dump_json())
    await JobQueue(redis, keys, "w1", lease_seconds=60).beat(None, json.dumps({"stage": "idle"}))
    observer = Observer(redis, keys, SPEC, folder)
    observer.begin(History())
    observer.search, observer.chat = search, QuietChat()
    observer.counters = {"seconds": 3.0, "prompt_tokens": 900.0, "completion_tokens": 80.0}
    await observer.look()
    looking = asyncio.create_task(observer.run())
    async with served(observer) as ask:
        try:
            yield Observed(conducted, search, observer, ask)
        finally:
            looking.cancel()
            conducted.journal.close()


def every_third_fails(candidate: Candidate) -> Measured | Failed:
    return Failed(reason="timeout") if int(candidate.id, 16) % 3 == 0 else unevenness(candidate)


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


async def test_the_status_is_the_same_over_http_and_for_the_command_line(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    async with observed(redis, keys, tmp_path) as it, evaluating(redis, keys, every_third_fails):
        await it.run()
        await redis.hset(keys.state, mapping={name: str(v) for name, v in it.observer.counters.items()})
        code, over_http = await it.ask("/api/status")
        by_command = await RemoteSearch(redis, keys, SPEC).status()
    assert code == 200
    assert over_http == by_command.model_dump(mode="json")
    assert over_http["measured"] + over_http["failed"] == over_http["candidates"] == 15
    assert over_http["failed"] > 0 and over_http["waiting"] == 0 and over_http["finished"]
    assert over_http["parents_source"] in ("llm", "stand-in") and over_http["degraded"] is False
    assert over_http["queue"] == {"queued": 0, "running": 0}
    assert over_http["tokens"] == {"prompt": 900, "completion": 80}
    assert over_http["workers"][0]["consumer"] == "w1"
    assert over_http["endpoints"]["local"]["errors"] == 1


async def test_a_search_that_has_ended_keeps_its_status_in_the_same_form(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    async with observed(redis, keys, tmp_path) as it, evaluating(redis, keys):
        await it.run()
        live = it.observer.status
    kept = saved_status(tmp_path)
    assert live is not None and kept is not None
    assert kept == live.model_copy(update={"daemon": None, "workers": ()})
    assert saved_status(tmp_path / "elsewhere") is None


async def test_the_population_is_shown_best_first_and_page_by_page(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    async with observed(redis, keys, tmp_path) as it, evaluating(redis, keys):
        await it.run()
        pages = [(await it.ask(f"/api/population?limit=4&offset={offset}"))[1] for offset in range(0, 20, 4)]
    members = [member for page in pages for member in page["members"]]
    assert {page["total"] for page in pages} == {len(members)} == {15}
    assert [member["rank"] for member in members] == list(range(1, 16))
    perplexities = [member["outcome"]["perplexity"] for member in members]
    assert perplexities == sorted(perplexities)
    assert members[0]["rates"] == list(it.search.population.top(1)[0].candidate.rates)


async def test_a_candidate_is_shown_before_and_after_it_is_measured(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    async with observed(redis, keys, tmp_path) as it:
        running = asyncio.create_task(it.run())

        async def issued() -> bool:
            return len(it.search.ledger) >= 3

        await eventually(issued)
        id_ = list(it.search.ledger)[2]
        _, waiting = await it.ask(f"/api/candidates/{id_}")
        assert (waiting["id"], waiting["outcome"], waiting["order"]) == (id_, None, None)
        async with evaluating(redis, keys):
            await running
        _, measured = await it.ask(f"/api/candidates/{id_}")
    assert measured["outcome"]["kind"] == "measured" and measured["rates"] == waiting["rates"]
    assert set(measured) == set(waiting)


async def test_events_tell_every_outcome_every_round_and_every_change_of_state(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    async with observed(redis, keys, tmp_path) as it:
        found: list[dict[str, Any]] = []
        following = asyncio.create_task(events_of(it.ask, found))
        await asyncio.sleep(0.1)
        async with evaluating(redis, keys, every_third_fails):
            await it.run()
        assert (await it.ask("/api/control", "POST", json={"command": "pause"}))[1]["control"] == "pause"
        it.observer.chat.degraded = "endpoints"  # type: ignore[union-attr]
        await redis.delete(keys.worker("w1"))
        await it.observer.look()
        await asyncio.sleep(0.1)
    await following
    outcomes = {e["candidate"]: e for e in found if e.get("event") in ("candidate_measured", "candidate_failed")}
    assert set(outcomes) == set(it.search.ledger)
    for id_, event in outcomes.items():
        evaluation = it.search.population.get(id_)
        assert evaluation is not None
        assert event["event"] == f"candidate_{evaluation.outcome.kind}"
        assert event["agent"] == evaluation.candidate.provenance.agent
    bests = [e["perplexity"] for e in found if e.get("best") is True]
    best = it.search.population.top(1)[0].outcome
    assert bests == sorted(bests, reverse=True) and isinstance(best, Measured)
    assert bests[-1] == pytest.approx(best.perplexity, abs=1e-6)
    Status.model_validate(found[0])
    others = [e for e in found[1:] if e["event"] not in ("candidate_measured", "candidate_failed")]
    assert {"event": "control_changed", "control": "pause"} in others
    assert {"event": "degraded_changed", "degraded": True} in others
    assert {"event": "finished_changed", "finished": True} in others
    assert {"event": "worker_left", "worker": "w1"} in others
    assert max(e["round"] for e in others if e["event"] == "round_started") == 2


async def test_a_client_that_comes_back_gets_what_it_missed_and_nothing_twice(tmp_path: Path) -> None:
    observer = nothing_yet(tmp_path)
    events = [Event("round_started", {"round": number}) for number in range(6)]
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    async with served(observer) as ask:
        following = asyncio.create_task(events_of(ask, first, most=2))
        await asyncio.sleep(0.1)
        observer.events.add(events[:2])
        last_id = await following
        observer.events.add(events[2:4])
        following = asyncio.create_task(events_of(ask, second, last_id, most=4))
        await asyncio.sleep(0.1)
        observer.events.add(events[4:])
        await following
    await observer.redis.aclose()
    assert [e["round"] for e in first + second] == list(range(6))


async def test_a_reader_that_falls_behind_is_told_how_many_events_it_missed() -> None:
    log = EventLog(kept=3)
    reader = log.reader()
    log.add([Event("round_started", {"round": number}) for number in range(10)])
    read = [await reader.next() for _ in range(4)]
    assert [e.record for e in read if e] == [
        {"event": "events_missed", "count": 7},
        *({"event": "round_started", "round": number} for number in (7, 8, 9)),
    ]
    assert read[1] is not None
    known = await log.reader(read[1].id).next()
    assert known is not None and known.record["round"] == 8
    for foreign in ("", "x", "other-3", "-1", "other-²"):
        first = await asyncio.wait_for(log.reader(foreign).next(), 1)
        assert first is not None and first.record["round"] == 7
    log.add([Event("search_ended", {"finished": True})])
    log.close()
    last = await reader.next()
    assert last is not None and last.record["event"] == "search_ended"
    assert await reader.next() is None


async def test_the_metrics_are_those_of_the_search_and_prometheus_can_read_them(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    async with observed(redis, keys, tmp_path) as it, evaluating(redis, keys, every_third_fails):
        for seconds in (0.2, 3.0):
            it.ask.api.metrics.observe({"endpoint": "local", "seconds": seconds, "text": "[]"})
        it.ask.api.metrics.observe({"endpoint": "local", "seconds": 600.0, "text": None})  # an error
        await it.run()
        async with it.ask.request("/metrics") as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=")
            text = await response.text()
        status = it.observer.status
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return samples[f"selfpruner_{name}", tuple(sorted(labels.items()))]

    assert status is not None
    outcomes = {
        (source, kind): value("candidates_total", source=source, outcome=kind)
        for source in ("llm", "stand-in", "allocation")
        for kind in ("measured", "failed")
    }
    assert sum(outcomes.values()) == len(it.search.ledger)
    assert outcomes["llm", "failed"] + outcomes["stand-in", "failed"] == status.failed > 0
    assert value("best_perplexity") == value("best_fitness") == status.best_perplexity
    assert value("dense_perplexity") == CARD.dense.perplexity
    assert value("round") == 2 and value("finished") == 1 and value("paused") == 0 and value("redis_up") == 1
    assert value("queue_depth", state="queued") == value("queue_depth", state="running") == 0
    assert value("workers", stage="idle") == 1 and value("worker_utilisation") == 0
    assert value("llm_answer_seconds_count", endpoint="local") == 2
    assert value("llm_answer_seconds_bucket", endpoint="local", le="0.25") == 1
    assert value("llm_requests_total", endpoint="local") == 7 and value("llm_errors_total", endpoint="local") == 1
    assert value("llm_tokens_total", endpoint="local", kind="prompt") == 900
    assert value("llm_endpoint_up", endpoint="local") == 1 and value("degraded") == 0
    measured = sum(count for (_, kind), count in outcomes.items() if kind == "measured")
    assert value("evaluation_seconds_total") == pytest.approx(0.1 * measured)
    assert samples["process_open_fds", ()] > 0


async def test_control_is_read_and_written_and_doing_it_twice_does_no_harm(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    async with observed(redis, keys, tmp_path) as it:
        for command in ("pause", "pause", "run", "run", "stop"):
            answer = {"search": "test", "control": command}
            assert await it.ask("/api/control", "POST", json={"command": command}) == (200, answer)
            assert await it.ask("/api/control") == (200, answer)
            assert await Control(redis, keys).read() == command
            assert (await it.ask("/api/status"))[1]["control"] == command


async def test_two_hundred_clients_that_only_listen_are_bounded_and_the_search_does_not_feel_them(
    redis: Redis, keys: Keys, tmp_path: Path
) -> None:
    async with (
        observed(redis, keys, tmp_path) as it,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        ask = Asked(it.ask.api, it.ask.url, session)
        clients = await asyncio.gather(*(ask.request("/api/events") for _ in range(200)))
        statuses = [client.status for client in clients]
        assert statuses.count(200) == MAX_EVENT_STREAMS and statuses.count(503) == 200 - MAX_EVENT_STREAMS
        assert (await it.ask("/api/status"))[0] == 200
        async with evaluating(redis, keys) as evaluated:
            await it.run()
        assert len(it.search.population) == 15 and set(evaluated.values()) == {1}
        for client in clients:
            client.close()

        async def room_again() -> bool:
            return it.ask.api.metrics.event_streams == 0

        await eventually(room_again)


async def test_the_last_that_listeners_are_told_is_that_the_search_has_ended(tmp_path: Path) -> None:
    observer = nothing_yet(tmp_path)
    async with aiohttp.ClientSession() as session:
        async with served(observer) as ask:
            client = await Asked(ask.api, ask.url, session).request("/api/events")
            assert client.status == 200
            observer.finished = True
        lines = (await client.text()).splitlines()
    assert 'data: {"event":"search_ended","finished":true}' in lines


async def test_the_api_ends_within_a_second_whoever_still_listens(tmp_path: Path) -> None:
    observer = nothing_yet(tmp_path)
    async with aiohttp.ClientSession() as session:
        async with served(observer) as ask:
            clients = [await Asked(ask.api, ask.url, session).request("/api/events") for _ in range(20)]
            _, writer = await asyncio.open_connection("127.0.0.1", int(ask.url.rpartition(":")[2]))
            began = time.monotonic()
        assert time.monotonic() - began < 1
        for client in clients:
            assert b"search_ended" in await client.read()
        writer.close()
    await observer.redis.aclose()


async def test_while_redis_is_away_the_api_answers_and_says_so(keys: Keys, tmp_path: Path, server: Server) -> None:
    redis = connect(server.url)
    async with observed(redis, keys, tmp_path) as it:
        assert (await it.ask("/readyz"))[0] == 200
        server.kill()
        with capture_logs() as log:
            for _ in range(3):
                await it.observer.look()
        assert not log  # one line for each look would fill it
        code, ready = await it.ask("/readyz")
        assert code == 503 and not ready["redis"]
        status = (await it.ask("/api/status"))[1]
        assert status["redis"] == "away" and status["search"] == "test"
        assert (await it.ask("/livez"))[0] == 200
        code, answer = await it.ask("/api/control", "POST", json={"command": "pause"})
        assert code == 503 and "Redis" in answer["error"]
        server.start()

        async def back() -> bool:
            return (await it.ask("/readyz"))[0] == 200

        await eventually(back)
        assert (await it.ask("/api/status"))[1]["redis"] == "answers"
    await redis.aclose()


async def test_a_port_that_is_taken_is_named_unless_any_other_will_do(tmp_path: Path) -> None:
    observer = nothing_yet(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for free_port in (True, False):  # a port that was asked for is never changed
            api = HttpApi(HttpSettings(port=port), Access(None), observer, free_port=free_port)
            with pytest.raises(CannotListen, match=f"port {port} of 127.0.0.1.*another program.*http.port"):
                async with api.serving():
                    pass
    await observer.redis.aclose()


async def test_figures_that_json_does_not_know_become_null(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    async with observed(redis, keys, tmp_path) as it:
        it.observer.events.add([Event("odd", {"figure": float("nan"), "more": [float("inf"), 1.5]})])
        headers = {"Last-Event-ID": "other-1"}
        async with it.ask.request("/api/events", headers=headers) as response:
            async for line in response.content:
                if line.startswith(b'data: {"event":"odd"'):
                    break
    assert json.loads(line.removeprefix(b"data: "), parse_constant=pytest.fail) == {
        "event": "odd",
        "figure": None,
        "more": [None, 1.5],
    }
