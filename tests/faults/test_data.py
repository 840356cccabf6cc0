"""Faults of the server's data: lost, damaged, outdated, or changed by another program."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import structlog

from daemon.local import valkey as embedded
from protocol.errors import SelfPrunerError
from protocol.plans.candidate import Candidate, Failed, Measured
from protocol.queue.connection import connect
from protocol.queue.keys import GROUP
from tests.faults.kit import Daemon, Kit, candidates, eventually
from tests.faults.marks import fault, slow_fault


@fault("18", "the data is gone in mid-search", "FLUSHALL", "told loudly, restored, no hot loop")
async def test_a_flushed_server_gets_its_data_back_from_the_daemon(kit: Kit) -> None:
    many = candidates(8)
    kit.write_script({many[-1].id: ["sleep:2"]})
    kit.disturbed["*"] = 1
    daemon = await kit.daemon()
    workers = [await kit.worker(), await kit.worker()]
    await daemon.issue(many[:4])
    await daemon.measured(4)
    await daemon.issue(many[4:])
    await kit.evaluating(many[-1].id)
    with structlog.testing.capture_logs() as events:
        await kit.redis.flushall()
        await daemon.settled()
    (lost,) = [event for event in events if event["event"] == "redis_lost_data"]
    assert lost["log_level"] == "error" and lost["restored"] >= len(many)
    for worker in workers:
        assert len(worker.events("group_lost")) <= 3
    fresh = Daemon(kit.redis, kit.keys)
    await fresh.begin()
    assert list(fresh.ledger.values()) == many
    await fresh.end()


@slow_fault("18", "the data is gone again and again", "FLUSHALL every 0.5 s, 10 times", "restored each time")
async def test_a_server_that_is_flushed_again_and_again_ends_with_every_outcome(kit: Kit) -> None:
    many = candidates(30)
    kit.disturbed["*"] = 10
    daemon, (worker,) = await kit.started({"*": ["sleep:0.2"]})
    await daemon.issue(many)
    for _ in range(10):
        await asyncio.sleep(0.5)
        await kit.redis.flushall()
    await daemon.settled()
    assert len(worker.events("group_lost")) <= 12


@pytest.mark.parametrize(
    "loss", [pytest.param("group", marks=pytest.mark.faults), "stream", pytest.param("trim", marks=pytest.mark.faults)]
)
@fault("19", "group or stream gone, stream trimmed", "XGROUP DESTROY, DEL, XTRIM 0", "heals, one outcome each")
async def test_a_lost_group_stream_or_entry_heals_by_itself(kit: Kit, loss: str) -> None:
    many = candidates(6)
    kit.disturbed["*"] = 1
    daemon, (worker,) = await kit.started({many[0].id: ["sleep:2"]})
    await daemon.issue(many)
    await kit.evaluating(many[0].id)
    if loss == "group":
        await kit.redis.xgroup_destroy(kit.keys.jobs, GROUP)
    elif loss == "stream":
        await kit.redis.delete(kit.keys.jobs)
    else:
        await kit.redis.xtrim(kit.keys.jobs, maxlen=0, approximate=False)
    await daemon.settled()
    assert all(isinstance(daemon.outcome(each), Measured) for each in many)
    assert len(worker.events("lease_lost")) <= 1


@slow_fault("20", "ghosts: pending entries without a body", "a dead owner; XTRIM 0", "gone with their consumer")
async def test_ghosts_of_dead_workers_are_cleaned_up_with_them(kit: Kit) -> None:
    many = candidates(3)
    kit.disturbed["*"] = 1
    daemon = await kit.daemon()
    await daemon.issue(many)
    await kit.redis.xgroup_create(kit.keys.jobs, GROUP, id="0")
    await kit.redis.xreadgroup(GROUP, "ghost", {kit.keys.jobs: ">"}, count=2)
    await kit.redis.xtrim(kit.keys.jobs, maxlen=0, approximate=False)
    worker = await kit.worker()
    await daemon.settled()
    owner = await kit.owner(worker)

    async def gone() -> bool:
        consumers = await kit.redis.xinfo_consumers(kit.keys.jobs, GROUP)
        return not await kit.pending() and [c["name"] for c in consumers] == [owner]

    await eventually(gone)


@fault("21", "the append-only file is cut", "7 bytes off its end, after SIGKILL", "starts, nothing lost")
async def test_an_append_only_file_without_its_end_loses_nothing(kit: Kit) -> None:
    many = candidates(6)
    kit.disturbed["*"] = 1
    daemon, _ = await kit.started()
    await daemon.issue(many[:3])
    await daemon.measured(3)
    kit.server.kill()
    (tail,) = (kit.server.folder / "appendonlydir").glob("*.incr.aof")
    with tail.open("r+b") as file:
        file.truncate(tail.stat().st_size - 7)
    kit.server.start()
    await daemon.settle(many[3:])


async def test_a_watch_of_the_servers_files_that_dies_says_so_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_: object) -> bool:
        raise RuntimeError("broken")

    monkeypatch.setattr(embedded, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(embedded._ServerFiles, "_are_there", breaks)
    with structlog.testing.capture_logs() as log:
        async with embedded.embedded_server(tmp_path) as url:
            await eventually(lambda: "server_watch_died" in [line["event"] for line in log], 20)
            redis: Any = connect(url)
            assert await redis.ping()
            await redis.aclose()


@fault("21", "the append-only file is damaged", "its middle zeroed, embedded server", "refused, file and fix named")
async def test_a_damaged_append_only_file_is_refused_with_its_name_and_the_fix(tmp_path: Path) -> None:
    async with embedded.embedded_server(tmp_path) as url:
        redis: Any = connect(url)
        for number in range(2000):
            await redis.set(f"key-{number}", "x" * 20)
        await redis.aclose()
    (tail,) = (tmp_path / "valkey" / "appendonlydir").glob("*.incr.aof")
    with tail.open("r+b") as file:
        file.seek(tail.stat().st_size // 2)
        file.write(b"\0" * 200)
    with pytest.raises(SelfPrunerError, match=r"incr\.aof.*check-aof --fix"):
        async with embedded.embedded_server(tmp_path):
            raise AssertionError("it started")


@slow_fault("22", "the server runs on an older copy", "append-only folder put back", "reconciled, none applied twice")
async def test_a_server_on_an_older_copy_of_its_data_is_reconciled(kit: Kit) -> None:
    many = candidates(9)
    kit.disturbed["*"] = 1
    daemon, _ = await kit.started()
    await daemon.issue(many[:3])
    await daemon.measured(3)
    data = kit.server.folder / "appendonlydir"
    await asyncio.sleep(1.1)  # for the server's own write of the file
    shutil.copytree(data, kit.folder / "older")
    await daemon.issue(many[3:6])
    await daemon.measured(6)
    kit.server.kill()
    shutil.rmtree(data)
    shutil.copytree(kit.folder / "older", data)
    with structlog.testing.capture_logs() as events:
        kit.server.start()
        await daemon.settle(many[6:])
        await kit.end()
    assert [event["event"] for event in events].count("redis_lost_data") == 1


async def _write_invalid_results(redis: Any, stream: str, known: Candidate) -> None:
    await redis.xadd(stream, {"id": known.id, "outcome": Failed(reason="timeout").model_dump_json()})
    await redis.xadd(stream, {"id": "0123456789abcdef", "outcome": Failed(reason="timeout").model_dump_json()})
    await redis.xadd(stream, {"id": known.id, "outcome": '{"kind": "measured", "version": 9}'})
    await redis.xadd(stream, {"id": known.id, "outcome": "\x00\xff garbage"})
    await redis.xadd(stream, {"nothing": "of ours"})


@fault("30", "results and jobs by another hand", "duplicate, unknown, wrong schema, garbage", "once, or dead")
async def test_garbage_in_the_streams_is_dropped_and_the_daemon_and_worker_continue(kit: Kit) -> None:
    first, second = candidates(2)
    daemon, _ = await kit.started()
    await daemon.measure([first])
    await _write_invalid_results(kit.redis, kit.keys.results, first)
    await kit.redis.xadd(kit.keys.jobs, {"id": "fedcba9876543210", "candidate": "{", "fingerprint": "x"})
    await kit.redis.xadd(kit.keys.jobs, {"nothing": "of ours"})
    await daemon.settle([second])
    assert isinstance(daemon.outcome(first), Measured) and isinstance(daemon.outcome(second), Measured)
    assert [dead["reason"] for dead in await kit.dead()] == ["unreadable", "unreadable"]
