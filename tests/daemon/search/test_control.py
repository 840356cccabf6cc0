"""The control key, as people and the command line set it."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from daemon.search.control import ControlWatcher, StopRequested
from protocol.queue import control as control_module
from protocol.queue.control import SETTLED_SECONDS, Control
from protocol.queue.keys import Keys


async def test_without_a_key_the_search_runs(redis: Redis, keys: Keys) -> None:
    assert await Control(redis, keys).read() == "run"


@pytest.mark.parametrize("written", ["pause", "PAUSE", " pause\n"])
async def test_a_value_set_by_hand_is_understood(redis: Redis, keys: Keys, written: str) -> None:
    await redis.set("selfpruner:test:control", written)
    assert await Control(redis, keys).read() == "pause"


async def test_a_value_that_means_nothing_changes_nothing(redis: Redis, keys: Keys) -> None:
    control = Control(redis, keys)
    await control.write("pause")
    assert await control.read() == "pause"
    await redis.set(keys.control, "puase")
    assert await control.read() == "pause"


async def test_a_paused_search_stays_paused_for_who_comes_when_its_key_is_misspelt(redis: Redis, keys: Keys) -> None:
    """A restarted daemon, or `selfpruner status`, never saw what was understood before."""
    daemon = Control(redis, keys)
    await daemon.write("pause")
    assert await daemon.read() == "pause"
    await redis.set(keys.control, "puase")
    with capture_logs() as logs:
        assert await Control(redis, keys).read() == "pause"
    assert [(line["value"], line["stays"]) for line in logs] == [("puase", "pause")]
    await redis.set(keys.control, "run")
    assert await daemon.read() == "run"
    await redis.set(keys.control, "???")
    assert await Control(redis, keys).read() == "run"


@pytest.mark.parametrize("bad", ["list", "bytes", "huge", "empty"])
async def test_a_value_that_is_no_word_changes_nothing_and_is_told_of_once(redis: Redis, keys: Keys, bad: str) -> None:
    client: Any = redis
    control = Control(redis, keys)
    await control.write("pause")
    assert await control.read() == "pause"
    if bad == "list":
        await client.delete(keys.control)
        await client.rpush(keys.control, "run")
    else:
        await client.set(keys.control, {"bytes": b"\xff\xfe", "huge": "run" * 5_000_000, "empty": ""}[bad])
    with capture_logs() as logs:
        assert [await control.read() for _ in range(3)] == ["pause"] * 3
    (line,) = logs
    assert line["event"] == "control_not_understood" and len(line["value"]) <= 40
    await control.write("run")
    assert await control.read() == "run"


async def test_while_the_data_is_lost_the_command_stays(redis: Redis, keys: Keys) -> None:
    """The daemon brings the command back with the rest, and the epoch last."""
    client: Any = redis
    control = Control(redis, keys)
    await client.set(keys.epoch, 7)
    await control.write("pause")
    assert await control.read() == "pause"
    await redis.flushall()
    assert await control.read() == "pause"
    await client.set(keys.epoch, 6)  # an older copy
    await control.write("run")
    assert await control.read() == "pause"
    await client.set(keys.epoch, 7)
    assert await control.read() == "run"


async def test_a_lower_epoch_that_stays_is_that_of_a_new_daemon(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data is lost for good, and the server's clock, from which an epoch is drawn, is behind."""
    now = [0.0]
    monkeypatch.setattr(control_module, "monotonic", lambda: now[0])
    client: Any = redis
    control = Control(redis, keys)
    await client.set(keys.epoch, 7)
    await control.write("pause")
    assert await control.read() == "pause"
    await redis.flushall()
    await control.write("run")
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
        await client.set(keys.epoch, epoch)
        assert await control.read() == command
    await control.write("stop")
    assert await control.read() == "run", "the epoch has fallen again"
    now[0] += 10 * SETTLED_SECONDS
    assert await control.read() == "stop"


async def test_without_an_epoch_the_command_stays_however_long(
    redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(control_module, "monotonic", lambda: now[0])
    client: Any = redis
    control = Control(redis, keys)
    await client.set(keys.epoch, 7)
    await control.write("pause")
    assert await control.read() == "pause"
    await redis.flushall()
    for _ in range(3):
        now[0] += 10 * SETTLED_SECONDS
        assert await control.read() == "pause"


async def test_the_gate_closes_on_pause_and_opens_on_resume(redis: Redis, keys: Keys) -> None:
    control = Control(redis, keys)
    control_watcher = ControlWatcher(control)
    await control_watcher.begin()
    watching = asyncio.create_task(control_watcher.watch())
    await control_watcher.gate()
    await control.write("pause")
    async with asyncio.timeout(10):
        while control_watcher.command != "pause":
            await asyncio.sleep(0.01)
    waiting = asyncio.create_task(control_watcher.gate())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await control.write("run")
    async with asyncio.timeout(10):
        await waiting
    watching.cancel()


async def test_stop_ends_the_watching(redis: Redis, keys: Keys) -> None:
    control = Control(redis, keys)
    control_watcher = ControlWatcher(control)
    await control_watcher.begin()
    await control.write("stop")
    with pytest.raises(StopRequested):
        async with asyncio.timeout(10):
            await control_watcher.watch()


async def test_a_person_who_starts_a_stopped_search_overrules_the_stop_but_not_a_pause(
    redis: Redis, keys: Keys
) -> None:
    control = Control(redis, keys)
    for before, after in (("stop", "run"), ("pause", "pause")):
        await control.write(before)  # type: ignore[arg-type]
        control_watcher = ControlWatcher(control)
        await control_watcher.begin()
        assert control_watcher.command == after
