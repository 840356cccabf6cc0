"""A launched search with its HTTP API, as `selfpruner daemon` starts it: scripted LLM, instant worker, real server."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from daemon.http_api.token import kept_address, open_access
from daemon.launch.launch import Launch
from daemon.launch.llm import secrets_of
from daemon.monitor.observer import Observer
from daemon.monitor.summary import Summary
from daemon.settings.settings import Settings
from daemon.settings.sources import load
from daemon.state.history import load_history
from daemon.state.store import TICK_SECONDS
from protocol.errors import SearchExistsError, UsageError
from protocol.queue.control import Control
from protocol.queue.keys import Keys
from protocol.runtime import logs
from tests.support.cli import Cli
from tests.support.conducted import evaluating
from tests.support.samples import profile_for, write_daemon_settings
from tests.support.schema_answers import answer
from tests.support.scripted_llm import Handler, Reply, ScriptedLlm, as_json, hangs, refuses
from tests.support.servers import Server, eventually

KEY = "sk-a-key-that-must-stay-secret"
PATHS = ("/livez", "/readyz", "/metrics", "/api/status", "/api/population?limit=500", "/api/control")
SMALL = ["search.name=test", "search.population=4", "search.mutations=2", "search.crossovers=1", "search.rounds=2"]
TARGET = ["target.model=tiny", "target.rate=0.3", "data.calibration=self", "data.fitness=self"]


def settings_for(folder: Path, llm: ScriptedLlm, *more: str) -> Settings:
    endpoint = f"llm.endpoints=[{{base_url: '{llm.base_url}', model: m, api_key: {KEY}, name: scripted}}]"
    return load(None, [*SMALL, *TARGET, endpoint, f"run.folder={folder}", "llm.reply=edits", "http.port=0", *more])


class Launched:
    """A search under way: `url` once it listens."""

    def __init__(self, settings: Settings, server: Server) -> None:
        self.settings = settings
        settings.folder.mkdir(parents=True, exist_ok=True)
        self.access = open_access(settings.http, settings.folder)
        self.url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.launch = Launch(
            settings,
            server.url,
            settings.llm.endpoints,
            embedded=False,
            access=self.access,
            announce=self.url.set_result,
        )

    async def get(self, session: aiohttp.ClientSession, path: str, method: str = "GET", **more: Any) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {self.access.secrets[0]}"}
        async with session.request(method, await self.url + path, headers=headers, **more) as response:
            return response.status, await response.text()

    async def shows(self, session: aiohttp.ClientSession, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until this holds of the status, and return it."""
        status: dict[str, Any] = {}

        async def shown() -> bool:
            code, text = await self.get(session, "/api/status")
            status.update(json.loads(text))
            return code == 200 and holds(status)

        await eventually(shown)
        return status

    async def end(self) -> Summary:
        """Run the search to its end."""
        summary = await asyncio.wait_for(self.launch.run(), 60)
        assert summary is not None and summary.finished
        return summary


@asynccontextmanager
async def worker_there(redis: Redis, keys: Keys) -> AsyncIterator[Counter[str]]:
    """A worker that has published its profile and measures at once."""
    await redis.set(keys.profile, profile_for(load(None, [*SMALL, *TARGET]).spec()).model_dump_json())
    async with evaluating(redis, keys) as evaluated:
        yield evaluated


@pytest.fixture
async def llm() -> AsyncIterator[ScriptedLlm]:
    async with ScriptedLlm(answer) as llm:
        yield llm


@pytest.fixture
async def searched(redis: Redis, keys: Keys, server: Server, llm: ScriptedLlm, tmp_path: Path) -> Settings:
    """The settings of a search that has ended."""
    settings = settings_for(tmp_path, llm)
    async with worker_there(redis, keys):
        await Launched(settings, server).end()
    return settings


def status_in(settings: Settings) -> dict[str, Any]:
    status: dict[str, Any] = json.loads((settings.folder / "status.json").read_text())
    return status


async def test_a_search_is_paused_followed_and_finished_over_http(
    redis: Redis, keys: Keys, server: Server, llm: ScriptedLlm, tmp_path: Path
) -> None:
    await redis.set(keys.control, "pause")
    launched = Launched(settings_for(tmp_path, llm), server)
    running = asyncio.create_task(launched.end())
    async with aiohttp.ClientSession() as session, worker_there(redis, keys):
        await launched.shows(session, lambda status: status["control"] == "pause" and "scripted" in status["endpoints"])
        assert not llm.asked
        code, _ = await launched.get(session, "/api/control", "POST", json={"command": "run"})
        assert code == 200
        summary = await running
    status = status_in(launched.settings)
    assert status["finished"] and status["measured"] == 4 + 2 * 3
    assert summary.best and status["best_perplexity"] == summary.best.perplexity
    assert status["endpoints"]["scripted"]["requests"] == len(llm.asked)


async def test_its_time_is_shown_before_a_worker_has_made_its_model_ready(
    redis: Redis, keys: Keys, server: Server, llm: ScriptedLlm, tmp_path: Path
) -> None:
    launched = Launched(settings_for(tmp_path, llm), server)
    running = asyncio.create_task(launched.launch.run())
    async with aiohttp.ClientSession() as session:
        await launched.shows(session, lambda status: status["seconds"] >= TICK_SECONDS)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert not llm.asked


async def test_what_the_llm_used_is_shown_while_the_search_goes_on_and_failed_questions_are_no_answers(
    redis: Redis, keys: Keys, server: Server, tmp_path: Path
) -> None:
    """Three questions fail, three are answered, and the next one finds a model that thinks for ever."""

    def says_three(body: dict[str, Any]) -> str | Handler:
        number = len(thinker.asked)
        return refuses(500, "broken") if number <= 3 else answer(body) if number <= 6 else hangs

    async with ScriptedLlm(says_three) as thinker:
        priced = f"[{{base_url: '{thinker.base_url}', model: m, name: scripted, price_in: 1000, price_out: 1000}}]"
        options = [f"llm.endpoints={priced}", "llm.concurrency=1", "llm.attempts=1", "llm.proposals_per_call=1"]
        launched = Launched(settings_for(tmp_path, thinker, *options), server)
        running = asyncio.create_task(launched.launch.run())
        async with aiohttp.ClientSession() as session, worker_there(redis, keys):
            used = {"prompt": 30, "completion": 15}
            status = await launched.shows(session, lambda status: status["tokens"] == used)
            metrics = (await launched.get(session, "/metrics"))[1].splitlines()
            running.cancel()
            await running
    assert status["cost"] == pytest.approx((30 + 15) * 1000 / 1e6) and status["seconds"] > 0
    assert f"selfpruner_llm_cost {status['cost']}" in metrics
    assert 'selfpruner_llm_answer_seconds_count{endpoint="scripted"} 3.0' in metrics
    assert 'selfpruner_llm_errors_total{endpoint="scripted"} 3.0' in metrics
    saved = status_in(launched.settings)
    assert (saved["tokens"], saved["cost"]) == (status["tokens"], status["cost"])


async def test_a_stop_over_http_ends_the_search_with_clients_still_listening(
    redis: Redis, keys: Keys, server: Server, llm: ScriptedLlm, tmp_path: Path
) -> None:
    launched = Launched(settings_for(tmp_path, llm, "search.rounds=1000"), server)
    running = asyncio.create_task(launched.launch.run())
    async with aiohttp.ClientSession() as session, worker_there(redis, keys):
        headers = {"Authorization": f"Bearer {launched.access.secrets[0]}"}
        stream = await session.get(await launched.url + "/api/events", headers=headers)
        await stream.content.readline()
        await launched.get(session, "/api/control", "POST", json={"command": "stop"})
        summary = await asyncio.wait_for(running, 3)
        assert (await stream.read()).decode()
    assert summary is None or not summary.finished


async def test_what_befalls_the_observer_does_not_end_the_search(
    redis: Redis, keys: Keys, server: Server, llm: ScriptedLlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def dies(_: object) -> None:
        await asyncio.sleep(0.1)
        raise RuntimeError("a mistake")

    monkeypatch.setattr(Observer, "run", dies)
    with capture_logs() as log:
        async with worker_there(redis, keys):
            await Launched(settings_for(tmp_path, llm), server).end()
    assert [line["log_level"] for line in log if line["event"] == "observer_died"] == ["error"]


@pytest.mark.usefixtures("restored_logs")
async def test_no_reply_and_no_file_ever_holds_a_secret(
    redis: Redis, keys: Keys, server: Server, tmp_path: Path
) -> None:
    async with ScriptedLlm([refuses(500, f"the key {KEY} is wrong")]) as llm:
        settings = settings_for(tmp_path, llm, "llm.attempts=1")
        launched = Launched(settings, server)
        token = launched.access.secrets[0]
        log = settings.folder / "log.jsonl"
        logs.configure(file=log, console=False, level="DEBUG", secrets=[*secrets_of(settings), token])
        seen = []
        async with aiohttp.ClientSession() as session, worker_there(redis, keys):
            running = asyncio.create_task(launched.launch.run())
            url = await launched.url
            await eventually(lambda: kept_address(settings.folder) == f"{url}/#token={token}")
            async with session.get(f"{url}/api/status?token={token}", headers={"Authorization": f"Bearer {token}x"}):
                pass
            while not running.done():
                for path in PATHS:
                    with suppress(aiohttp.ClientConnectionError):  # the search has just ended
                        seen.append((await launched.get(session, path))[1])
                await asyncio.sleep(0.05)
            assert (await running) is not None
    files = {path.name: path.read_text() for path in settings.folder.iterdir() if path.name != "http-token"}
    assert {"log.jsonl", "status.json", "transcript.jsonl", "evaluations.jsonl"} <= set(files) and len(seen) > 6
    for secret in (KEY, token):
        assert not [name for name, text in files.items() if secret in text]
        assert not [text for text in seen if secret in text]


async def test_a_second_daemon_of_a_search_is_told_of_the_first_and_not_of_its_port(
    redis: Redis, keys: Keys, server: Server, llm: ScriptedLlm, tmp_path: Path
) -> None:
    await redis.set(keys.control, "pause")
    first = Launched(settings_for(tmp_path / "1", llm), server)
    running = asyncio.create_task(first.launch.run())
    port = (await first.url).rpartition(":")[2]
    second = Launched(settings_for(tmp_path / "2", llm, f"http.port={port}"), server)

    async def in_charge() -> bool:
        return bool(await redis.exists(keys.daemon))

    await eventually(in_charge)
    with pytest.raises(SearchExistsError, match="already run by"):
        await second.launch.run()
    running.cancel()
    assert await running is None


def test_the_daemon_on_a_taken_port_exits_with_code_2(tmp_path: Path, cli: Cli) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        settings = write_daemon_settings(tmp_path, http={"port": port})
        code, _, err = cli.run("daemon", settings, "--set", "redis.url=redis://127.0.0.1:1")
    assert code == 2 and f"port {port} of 127.0.0.1" in err.splitlines()[-1]


def listed(context: int) -> Reply:
    """The models of an endpoint with so large a context."""
    return as_json({"object": "list", "data": [{"id": "m", "max_model_len": context}]})


def measured_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["llm.reply=lists"], r"lists` takes about [\d,]+ tokens for 4 lists of \d+ rates, and scripted has 700"),
        (["search.max_tokens=10"], r"search.max_tokens \(10\) is smaller than what the first population takes"),
        (
            ["search.first_windows=50"],
            r"search.first_windows \(50\) must be smaller than the number of windows of the fitness text",
        ),
    ],
)
async def test_what_does_not_go_with_model_and_text_is_refused_and_the_name_stays_free(
    redis: Redis, keys: Keys, server: Server, tmp_path: Path, wrong: list[str], says: str
) -> None:
    async with ScriptedLlm(answer, models=[listed(700)]) as llm:
        async with worker_there(redis, keys):
            with pytest.raises(UsageError, match=says):
                await Launched(settings_for(tmp_path, llm, *wrong), server).end()
            assert not await redis.exists(keys.issued) and not llm.asked
            await redis.hset(keys.state, mapping={"seconds": 5000.0})
        fixed = settings_for(tmp_path, llm, "target.rate=0.4", "search.budget_hours=1")
        await redis.set(keys.profile, profile_for(fixed.spec()).model_dump_json())
        async with evaluating(redis, keys):
            summary = await Launched(fixed, server).end()
    assert summary.seconds < 1000, "what was counted for another spec is forgotten"
    assert summary.candidates["by_outcome"]["measured"] == 4 + 2 * 3


async def test_a_search_that_has_begun_goes_on_whatever_its_endpoint_says_of_itself_now(
    redis: Redis, keys: Keys, server: Server, tmp_path: Path
) -> None:
    """A server came back with a smaller context, and the budget was made smaller than the first population."""
    for tokens, options in ((100_000, []), (700, ["search.max_tokens=10", "search.rounds=3"])):
        async with ScriptedLlm([refuses(400, "no")], models=[listed(tokens)]) as llm, worker_there(redis, keys):
            await Launched(settings_for(tmp_path, llm, "llm.reply=lists", *options), server).end()


async def test_a_finished_search_whose_server_was_emptied_while_no_daemon_ran_comes_back_from_its_folder(
    redis: Redis, keys: Keys, server: Server, llm: ScriptedLlm, searched: Settings
) -> None:
    before, asked = measured_in(searched.folder), len(llm.asked)
    await redis.flushall()
    with capture_logs() as log:
        async with worker_there(redis, keys) as evaluated:
            await Launched(searched, server).end()
    assert measured_in(searched.folder) == before
    assert len(llm.asked) == asked and not evaluated
    (lost,) = [line for line in log if line["event"] == "redis_lost_data"]
    assert (lost["log_level"], lost["restored"]) == ("error", 2 * len(before))
    counters = (await load_history(redis, keys)).counters
    assert counters["requests"] >= asked and counters["prompt_tokens"] > 0


async def test_damaged_entries_of_a_history_come_back_from_the_folder(
    redis: Redis, keys: Keys, server: Server, searched: Settings
) -> None:
    before = await load_history(redis, keys)
    client: Any = redis
    one, two, three = list(before.ledger)[:3]
    await client.hset(keys.candidates, one, b"\xff not UTF-8")
    await client.hset(keys.outcomes, two, b"\xff not UTF-8")
    await client.hdel(keys.candidates, three)
    await client.hset(keys.state, "prompt_tokens", b"\xff not UTF-8")
    await client.hset(keys.state, "of another hand", "no number")
    await client.set(keys.spec, b"\xff not UTF-8")
    with capture_logs() as log:
        async with worker_there(redis, keys) as evaluated:
            await Launched(searched, server).end()
    assert not evaluated
    after = await load_history(redis, keys)
    assert (after.ledger, after.damaged) == (before.ledger, 0)
    restored, known = ({e.candidate.id: e.outcome for e in history.population} for history in (after, before))
    assert restored == known
    assert [line["entries"] for line in log if line["event"] == "history_damaged"] == [7]
    assert after.counters["prompt_tokens"] == before.counters["prompt_tokens"] > 0


async def test_damaged_entries_that_no_copy_has_are_measured_again(
    redis: Redis, keys: Keys, server: Server, searched: Settings
) -> None:
    before = await load_history(redis, keys)
    client: Any = redis
    await client.hset(keys.candidates, list(before.ledger)[-1], b"\xff not UTF-8")
    (searched.folder / "evaluations.jsonl").unlink()
    async with worker_there(redis, keys):
        await Launched(searched, server).end()
    after = await load_history(redis, keys)
    assert (after.ledger.keys(), after.damaged) == (before.ledger.keys(), 0)


async def test_a_pause_comes_back_from_the_folder_of_a_server_that_was_emptied_while_no_daemon_ran(
    redis: Redis, keys: Keys, server: Server, searched: Settings
) -> None:
    (searched.folder / "status.json").write_text(json.dumps(status_in(searched) | {"control": "pause"}))
    await redis.flushall()
    control = Control(redis, keys)

    async def paused() -> bool:
        return await control.read() == "pause"

    async with worker_there(redis, keys):
        running = asyncio.create_task(Launched(searched, server).end())
        await eventually(paused)
        await control.write("run")
        await running


async def test_a_folder_of_other_settings_is_refused_with_code_2_and_left_as_it_is(
    redis: Redis, server: Server, llm: ScriptedLlm, tmp_path: Path, searched: Settings
) -> None:
    kept = ("evaluations.jsonl", "best.json", "spec.json", "summary.json", "status.json", "transcript.jsonl")
    before = [(searched.folder / name).read_bytes() for name in kept]
    await redis.flushall()
    says = r"evaluations of a search with other settings \(rate: 0\.3 there, 0\.5 here\)"
    with pytest.raises(UsageError, match=says):  # code 2
        await Launched(settings_for(tmp_path, llm, "target.rate=0.5"), server).end()
    assert [(searched.folder / name).read_bytes() for name in kept] == before
