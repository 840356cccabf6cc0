"""The control key, as people and the command line set it."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from daemon.search.control import ControlWatcher, StopRequested
from protocol.queue import control as control_module
from protocol.queue.control import SETTLED_SECONDS, Command, Control
from protocol.queue.keys import Keys


async def test_without_a_key_the_search_runs(redis: Redis, keys: Keys) -> None:
    assert await Control(redis, keys).read() == "run"


@pytest.mark.parametrize("written", ["pause", "PAUSE", " pause\n"])
async def test_a_value_set_by_hand_is_understood(redis: Redis, keys: Keys, written: str) -> None:
    await redis.set("selfpruner:test:control", written)
    assert await Control(redis, keys).read() == "pause"


@pytest.fixture
async def paused(redis: Redis, keys: Keys) -> Control:
    """The control of a search that a daemon with the epoch 7 has paused."""
    await redis.set(keys.epoch, 7)
    control = Control(redis, keys)
    await control.write("pause")
    assert await control.read() == "pause"
    return control


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    now = [0.0]
    monkeypatch.setattr(control_module, "monotonic", lambda: now[0])
    return now


async def test_a_value_that_means_nothing_changes_nothing(redis: Redis, keys: Keys, paused: Control) -> None:
    """A restarted daemon, or `selfpruner status`, never saw what was understood before."""
    await redis.set(keys.control, "puase")
    assert await paused.read() == "pause"
    with capture_logs() as logs:
        assert await Control(redis, keys).read() == "pause"
    assert [(line["value"], line["stays"]) for line in logs] == [("puase", "pause")]
    await redis.set(keys.control, "run")
    assert await paused.read() == "run"
    await redis.set(keys.control, "???")
    assert await Control(redis, keys).read() == "run"


@pytest.mark.parametrize("bad", ["list", "bytes", "huge", "empty"])
async def test_a_value_that_is_no_word_changes_nothing_and_is_told_of_once(
    redis: Redis, keys: Keys, paused: Control, bad: str
) -> None:
    client: Any = redis
    if bad == "list":
        await client.delete(keys.control)
        await client.rpush(keys.control, "run")
    else:
        await client.set(keys.control, {"bytes": b"\xff\xfe", "huge": "run" * 5_000_000, "empty": ""}[bad])
    with capture_logs() as logs:
        assert [await paused.read() for _ in range(3)] == ["pause"] * 3
    (line,) = logs
    assert line["event"] == "control_not_understood" and len(line["value"]) <= 40
    await paused.write("run")
    assert await paused.read() == "run"


async def test_while_the_data_is_lost_the_command_stays(redis: Redis, keys: Keys, paused: Control) -> None:
    """The daemon brings the command back with the rest, and the epoch last."""
    await redis.flushall()
    assert await paused.read() == "pause"
    await redis.set(keys.epoch, 6)  # an older copy
    await paused.write("run")
    assert await paused.read() == "pause"
    await redis.set(keys.epoch, 7)
    assert await paused.read() == "run"


async def test_a_lower_epoch_that_stays_is_that_of_a_new_daemon(
    redis: Redis, keys: Keys, paused: Control, now: list[float]
) -> None:
    """The data is lost for good, and the server's clock, from which an epoch is drawn, is behind."""
    await redis.flushall()
    await paused.write("run")
    for epoch, seconds, command in (
        (5, 0, "pause"),
        (5, SETTLED_SECONDS - 1, "pause"),
        (4, 2, "pause"),
        (4, SETTLED_SECONDS - 1, "pause"),
        (4, 2, "run"),
        (4, 0, "run"),
        (3, 0, "run"),
    ):
        now[0] += seconds
        await redis.set(keys.epoch, epoch)
        assert await paused.read() == command
    await paused.write("stop")
    assert await paused.read() == "run", "the epoch has fallen again"
    now[0] += 10 * SETTLED_SECONDS
    assert await paused.read() == "stop"


async def test_without_an_epoch_the_command_stays_however_long(redis: Redis, paused: Control, now: list[float]) -> None:
    await redis.flushall()
    for _ in range(3):
        now[0] += 10 * SETTLED_SECONDS
        assert await paused.read() == "pause"


async def begun(redis: Redis, keys: Keys) -> ControlWatcher:
    watcher = ControlWatcher(Control(redis, keys))
    await watcher.begin()
    return watcher


async def test_the_gate_closes_on_pause_and_opens_on_resume(redis: Redis, keys: Keys) -> None:
    control, watcher = Control(redis, keys), await begun(redis, keys)
    watching = asyncio.create_task(watcher.watch())
    await watcher.gate()
    await control.write("pause")
    async with asyncio.timeout(10):
        while watcher.command != "pause":
            await asyncio.sleep(0.01)
    waiting = asyncio.create_task(watcher.gate())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await control.write("run")
    async with asyncio.timeout(10):
        await waiting
    watching.cancel()


async def test_stop_ends_the_watching(redis: Redis, keys: Keys) -> None:
    watcher = await begun(redis, keys)
    await Control(redis, keys).write("stop")
    with pytest.raises(StopRequested):
        async with asyncio.timeout(10):
            await watcher.watch()


@pytest.mark.parametrize(("before", "after"), [("stop", "run"), ("pause", "pause")])
async def test_a_person_who_starts_a_stopped_search_overrules_the_stop_but_not_a_pause(
    redis: Redis, keys: Keys, before: Command, after: Command
) -> None:
    await Control(redis, keys).write(before)
    assert (await begun(redis, keys)).command == after
