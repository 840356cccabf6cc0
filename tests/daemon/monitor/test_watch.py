"""`selfpruner watch`: follows a search in Redis without the daemon's HTTP API, on a terminal or as JSON."""

import asyncio
import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis.asyncio import Redis
from rich.console import Console
from rich.live import Live

from agents.llm.endpoint import Awaited
from agents.population.population import Evaluation
from daemon.local.folder_lock import is_running, lock_folder
from daemon.monitor import watch as watch_module
from daemon.monitor.events import Event
from daemon.monitor.remote import RemoteSearch, open_remote
from daemon.monitor.status import EndpointStatus, QueueDepth, Status
from daemon.monitor.watch import follow, json_lines, on_screen
from daemon.monitor.watch_screen import RATE_SECONDS, Screen, status_tables
from protocol.errors import UsageError
from protocol.queue.connection import connect
from protocol.queue.keys import Keys
from protocol.queue.worker_status import WorkerStatus
from tests.support.observed import every_third_fails, observed
from tests.support.samples import SPEC, STATUS, candidates, measured
from tests.support.servers import Server, eventually

pytestmark = pytest.mark.one_server


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "LOOK_SECONDS", 0.05)


def shown(screen: Screen, status: Status, members: list[Evaluation] | None = None) -> str:
    """The screen as a person sees it."""
    console = Console(width=160, file=io.StringIO())
    console.print(screen.render(status, members or []))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def screen_after(status: Status, *events: Event) -> Screen:
    screen = Screen()
    screen.take(status, events)
    return screen


async def test_a_search_is_followed_from_another_process_to_its_end(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    out = io.StringIO()
    await redis.set(keys.spec, SPEC.model_dump_json())
    async with observed(redis, keys, tmp_path) as it:
        watching = asyncio.create_task(follow(RemoteSearch(redis, keys, SPEC), None, json_lines(out)))
        await asyncio.sleep(0.2)
        await it.searched(every_third_fails)
        await redis.delete(keys.daemon)
        await asyncio.wait_for(watching, 10)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    Status.model_validate(events[0])
    outcomes = {e["candidate"]: e for e in events if e["event"] in ("candidate_measured", "candidate_failed")}
    assert set(outcomes) == set(it.search.state.ledger)
    best = it.search.state.population.top(1)[0].candidate.id
    assert [e["candidate"] for e in events if e.get("is_best")][-1] == best
    assert {"event": "finished_changed", "finished": True} in events
    assert events[-1] == {"event": "search_ended", "finished": True}


async def test_the_terminal_shows_the_search_and_keeps_showing_it_while_redis_is_away(
    server: Server, keys: Keys, tmp_path: Path
) -> None:
    redis = connect(server.url)
    screen = io.StringIO()
    console = Console(width=160, file=screen, force_terminal=True)

    async with observed(redis, keys, tmp_path) as it:
        await it.searched()
        best = it.search.state.population.top(1)[0].candidate.id
        with Live(console=console, auto_refresh=False) as live:
            tell = on_screen(live, Screen())
            watching = asyncio.create_task(follow(RemoteSearch(redis, keys, SPEC), None, tell))
            await eventually(lambda: best in screen.getvalue())
            server.kill()
            await eventually(lambda: "Redis does not answer" in screen.getvalue())
            server.start()
            await redis.delete(keys.daemon)
            await asyncio.wait_for(watching, 10)
    await redis.aclose()
    assert "search ended" in screen.getvalue()


async def test_a_search_that_is_emptied_in_redis_is_followed_anew(redis: Redis, keys: Keys, tmp_path: Path) -> None:
    remote = RemoteSearch(redis, keys, SPEC)
    async with observed(redis, keys, tmp_path) as it:
        await it.searched()
        assert (await remote.status()).measured == 15
    await redis.flushall()
    assert (await remote.status()).measured == 0
    assert remote.top(3) == []


async def test_a_server_that_goes_away_while_it_is_asked_gets_one_sentence(server: Server, keys: Keys) -> None:
    redis = connect(server.url)
    await redis.set(keys.spec, SPEC.model_dump_json())
    await redis.aclose()
    with pytest.raises(UsageError, match="went away"):
        async with open_remote("test", server.url, Path()) as remote:
            server.kill()
            try:
                await remote.status()
            finally:
                server.start()


def test_the_screen_says_where_the_search_is(tmp_path: Path) -> None:
    first = candidates(1)[0]
    text = shown(screen_after(STATUS), STATUS, [Evaluation(first, measured(12.345, first), 0)])
    parts = ("30% removed", "running", "1 failed, 4 stopped early", "LLM 7, fallback 2, allocation 3")
    for part in (
        *parts,
        "3 queued, 1 running",
        "best 12.35 = 0.617 × uniform 20.00, dense 10.00",
        first.id,
        "host:2:b",
    ):
        assert part in text


def test_the_screen_fits_a_small_terminal_and_shows_more_events_on_a_large_one() -> None:
    events = [Event("round_started", {"round": number}) for number in range(30)]
    screen = screen_after(STATUS, *events)
    members = [Evaluation(made, measured(12.0 + i, made), i) for i, made in enumerate(candidates(5))]
    for height, shown_events in ((24, 4), (60, 20)):
        console = Console(width=100, height=height)
        lines = console.render_lines(screen.render(STATUS, members, height))
        text = ["".join(segment.text for segment in line).strip() for line in lines]
        assert len(text) < height
        assert len([line for line in text if "round started" in line]) == shown_events
        assert "round=29" in text[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"redis": "away"}, "Redis does not answer"),
        ({"daemon": None}, "stopped"),
        ({"daemon": None, "finished": True}, "finished"),
        ({"control": "pause"}, "pausing; the evaluation in progress will complete"),
        ({"control": "pause", "queue": QueueDepth(queued=3), "workers": ()}, "paused"),
        (
            {"control": "pause", "queue": QueueDepth(), "workers": (WorkerStatus(consumer="w", stage="scoring"),)},
            "paused; the model is still being prepared",
        ),
        ({"control": "stop"}, "stopping"),
        ({"awaited": Awaited(reason="gpt: no answer", until=None)}, "waiting for the LLM (gpt: no answer)"),
        (
            {"awaited": Awaited(reason="gpt: -", until=datetime.now(UTC) + timedelta(seconds=90.5))},
            "waiting for the LLM, ",
        ),
        (
            {"degraded": True, "degraded_by": "endpoints"},
            "degraded: no LLM endpoint answers; operators without an LLM propose",
        ),
        ({"degraded": True, "degraded_by": "budget"}, "degraded: the LLM budget is used up"),
        ({"workers": ()}, "waiting for a worker"),
    ],
)
def test_the_screen_says_what_is_not_as_it_should_be(change: dict[str, object], says: str) -> None:
    status = STATUS.model_copy(update=change)
    assert says in shown(screen_after(status), status)


def test_a_status_names_sources_and_states_in_plain_words() -> None:
    answers = EndpointStatus(state="asked", requests=7, errors=0, prompt_tokens=1, completion_tokens=1)
    fails = answers.model_copy(update={"state": "left alone", "reason": "HTTP 500"})
    status = STATUS.model_copy(
        update={"by_source": {"llm": 1, "classical": 2}, "endpoints": {"one": answers, "two": fails}}
    )
    console = Console(width=80, file=io.StringIO())
    console.print(*status_tables(status))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "LLM 1, optimiser 2" in text and "in use" in text and "resting: HTTP 500" in text


def test_what_stands_in_redis_is_shown_as_text_and_commands_nothing() -> None:
    worker = WorkerStatus(consumer="[/bold]\x1b[2J", stage="unusable", detail="[red]x\nnext")
    status = STATUS.model_copy(update={"workers": (worker,)})
    text = shown(screen_after(status, Event("worker_unusable", {"detail": "[link=x]\x1b]0;title\x07"})), status)
    assert "[/bold]?[2J" in text and "[red]x?next" in text and "[link=x]?]0;title?" in text
    assert "\x1b" not in text


def test_the_rate_is_that_of_the_last_two_minutes() -> None:
    now = 0.0
    screen = Screen(lambda: now)
    screen.take(STATUS, ())
    assert screen.per_minute is None
    for _ in range(300):
        now += 1.0
        measured_so_far = int(now) * 2 if now <= 150 else 300 + (int(now) - 150) // 2
        screen.take(STATUS.model_copy(update={"measured": measured_so_far, "failed": 0}), ())
        if now == 100:
            assert screen.per_minute == pytest.approx(120, rel=0.1)
    assert len(screen._counts) <= RATE_SECONDS + 1
    assert screen.per_minute == pytest.approx(30)


def test_whether_a_run_of_this_machine_is_alive_is_told_by_its_lock(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    with lock_folder(tmp_path):
        assert is_running(tmp_path)
    assert not is_running(tmp_path)
