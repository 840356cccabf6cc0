"""The HTTP API of a real search: what it shows, and what it is told."""

import asyncio
import json
import socket
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis
from structlog.testing import capture_logs

from daemon.http_api.api import HttpApi
from daemon.http_api.server import CannotListen
from daemon.http_api.token import Access
from daemon.monitor.events import Event
from daemon.monitor.observer import Observer
from daemon.monitor.remote import RemoteSearch, saved_status
from daemon.settings.service import HttpSettings
from protocol.queue.connection import connect
from protocol.queue.control import Control
from protocol.queue.keys import Keys
from tests.support.conducted import evaluating
from tests.support.observed import Observed, every_third_fails, observed
from tests.support.samples import PROFILE, SPEC
from tests.support.servers import Server, eventually

pytestmark = pytest.mark.one_server


async def test_the_status_is_the_same_over_http_and_for_the_command_line(
    redis: Redis, keys: Keys, it: Observed
) -> None:
    await it.searched(every_third_fails)
    await redis.hset(keys.state, mapping={name: str(v) for name, v in it.observer.counters.items()})
    code, over_http = await it.ask("/api/status")
    by_command = await RemoteSearch(redis, keys, SPEC).status()
    assert code == 200
    assert over_http == by_command.model_dump(mode="json")
    assert over_http["measured"] + over_http["failed"] == over_http["candidates"] == 15
    assert over_http["failed"] > 0 and over_http["waiting"] == 0 and over_http["finished"]
    assert over_http["parents_source"] in ("llm", "fallback") and over_http["degraded"] is False
    assert over_http["queue"] == {"queued": 0, "running": 0}
    assert over_http["tokens"] == {"prompt": 900, "completion": 80}
    assert over_http["workers"][0]["consumer"] == "w1"
    assert over_http["endpoints"]["scripted"]["errors"] == 1


async def test_a_search_that_has_ended_keeps_its_status_in_the_same_form(it: Observed, tmp_path: Path) -> None:
    await it.searched()
    live, kept = it.observer.status, saved_status(tmp_path)
    assert live is not None and kept is not None
    assert kept == live.model_copy(update={"daemon": None, "workers": ()})
    assert saved_status(tmp_path / "elsewhere") is None


async def test_the_population_is_shown_best_first_and_page_by_page(it: Observed) -> None:
    await it.searched()
    pages = [(await it.ask(f"/api/population?limit=4&offset={offset}"))[1] for offset in range(0, 20, 4)]
    members = [member for page in pages for member in page["members"]]
    assert {page["total"] for page in pages} == {len(members)} == {15}
    assert [member["rank"] for member in members] == list(range(1, 16))
    perplexities = [member["outcome"]["perplexity"] for member in members]
    assert perplexities == sorted(perplexities)
    assert members[0]["rates"] == list(it.search.state.population.top(1)[0].candidate.rates)


async def test_a_candidate_is_shown_before_and_after_it_is_measured(redis: Redis, keys: Keys, it: Observed) -> None:
    running = asyncio.create_task(it.run())

    await eventually(lambda: len(it.search.state.ledger) >= 3)
    id_ = list(it.search.state.ledger)[2]
    _, waiting = await it.ask(f"/api/candidates/{id_}")
    assert (waiting["id"], waiting["outcome"], waiting["order"]) == (id_, None, None)
    async with evaluating(redis, keys):
        await running
    _, measured = await it.ask(f"/api/candidates/{id_}")
    assert measured["outcome"]["kind"] == "measured" and measured["rates"] == waiting["rates"]
    assert set(measured) == set(waiting)


async def test_the_metrics_are_those_of_the_search_and_prometheus_can_read_them(it: Observed) -> None:
    for seconds in (0.2, 3.0):
        it.ask.api.metrics.observe({"endpoint": "scripted", "seconds": seconds, "text": "[]"})
    it.ask.api.metrics.observe({"endpoint": "scripted", "seconds": 600.0, "text": None})  # an error
    await it.searched(every_third_fails)
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
        for source in ("llm", "fallback", "classical", "allocation", "baseline")
        for kind in ("measured", "failed")
    }
    assert sum(outcomes.values()) == len(it.search.state.ledger)
    assert outcomes["llm", "failed"] + outcomes["fallback", "failed"] == status.failed > 0
    assert value("best_perplexity") == value("best_fitness") == status.best_perplexity
    assert value("dense_perplexity") == PROFILE.dense.perplexity
    assert value("round") == 2 and value("finished") == 1 and value("paused") == 0 and value("redis_up") == 1
    assert value("queue_depth", state="queued") == value("queue_depth", state="running") == 0
    assert value("workers", stage="idle") == 1 and value("worker_utilisation") == 0
    assert value("llm_answer_seconds_count", endpoint="scripted") == 2
    assert value("llm_answer_seconds_bucket", endpoint="scripted", le="0.25") == 1
    assert value("llm_requests_total", endpoint="scripted") == 7 and value("llm_errors_total", endpoint="scripted") == 1
    assert value("llm_tokens_total", endpoint="scripted", kind="prompt") == 900
    assert value("llm_endpoint_up", endpoint="scripted") == 1 and value("degraded") == 0
    measured = sum(count for (_, kind), count in outcomes.items() if kind == "measured")
    assert value("evaluation_seconds_total") == pytest.approx(0.1 * measured)
    assert samples["process_open_fds", ()] > 0


async def test_control_is_read_and_written_and_doing_it_twice_does_no_harm(
    redis: Redis, keys: Keys, it: Observed
) -> None:
    for command in ("pause", "pause", "run", "run", "stop"):
        answer = {"search": "test", "control": command}
        assert await it.ask("/api/control", "POST", json={"command": command}) == (200, answer)
        assert await it.ask("/api/control") == (200, answer)
        assert await Control(redis, keys).read() == command
        assert (await it.ask("/api/status"))[1]["control"] == command


async def test_while_redis_is_away_the_api_answers_and_says_so(keys: Keys, tmp_path: Path, server: Server) -> None:
    redis = connect(server.url)
    async with observed(redis, keys, tmp_path) as it:
        assert (await it.ask("/readyz"))[0] == 200
        server.kill()
        with capture_logs() as log:
            for _ in range(3):
                await it.observer.look()
        # One line for each look would fill it; that of a read which was cut off in its middle is the outage's.
        assert [line["event"] for line in log] in ([], ["redis_unreachable"])
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


async def test_a_port_that_is_taken_is_named_unless_any_other_will_do(observer: Observer) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for free_port in (True, False):  # a port that was asked for is never changed
            api = HttpApi(HttpSettings(port=port), Access(None), observer, free_port=free_port)
            with pytest.raises(CannotListen, match=f"port {port} of 127.0.0.1 .it is in use.*http.port"):
                async with api.serving():
                    pass


async def test_figures_that_json_does_not_know_become_null(it: Observed) -> None:
    it.observer.events.add([Event("odd", {"figure": float("nan"), "more": [float("inf"), 1.5]})])
    async with it.ask.request("/api/events", headers={"Last-Event-ID": "other-1"}) as response:
        async for line in response.content:
            if line.startswith(b'data: {"event":"odd"'):
                break
    assert json.loads(line.removeprefix(b"data: "), parse_constant=pytest.fail) == {
        "event": "odd",
        "figure": None,
        "more": [None, 1.5],
    }
