"""Faults of the server itself: down, frozen, full, or used by another daemon."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from protocol.queue.connection import connect
from tests.faults.kit import LEASE, PASSWORD, Kit, candidates, eventually
from tests.faults.marks import fault, slow_fault
from tests.support.disks import SmallDisk, mounted
from tests.support.servers import Server, server_binary


@slow_fault("15", "the server is killed in mid-evaluation", "SIGKILL, down for 2 leases, start", "evaluated once")
async def test_a_server_that_is_away_for_longer_than_a_lease_costs_no_second_evaluation(kit: Kit) -> None:
    one, *others = candidates(3)
    daemon, _ = await kit.started({one.id: [f"sleep:{4 * LEASE}"]}, workers=2)
    await daemon.issue([one, *others])
    await kit.evaluating(one.id)
    await daemon.measured(2)
    kit.server.kill()
    await asyncio.sleep(2 * LEASE)
    kit.server.start()
    await daemon.settled()
    assert kit.evaluations[one.id] == 1


@slow_fault("16", "the server stands still while enqueueing", "SIGSTOP for 12 s", "one entry for each id")
async def test_enqueueing_to_a_server_that_stands_still_leaves_one_entry_each(kit: Kit) -> None:
    daemon = await kit.daemon()
    many = candidates(5)
    kit.server.freeze()
    issuing = asyncio.create_task(daemon.issue(many))
    await asyncio.sleep(12)
    kit.server.thaw()
    await asyncio.wait_for(issuing, 30)
    entries = [fields["id"] for _, fields in await kit.redis.xrange(kit.keys.jobs)]
    assert sorted(entries) == sorted(each.id for each in many)
    await kit.worker()
    await daemon.settled()


@slow_fault("17", "no server at the start", "started 4 s late", "waits, tells it once, then works")
async def test_a_worker_waits_for_a_server_that_is_started_late(kit: Kit) -> None:
    await _starts_late(kit, 4)


@slow_fault("17", "no server at the start for long", "started 30 s late", "at most 10 log lines, then works")
async def test_a_worker_waits_long_for_a_server(kit: Kit) -> None:
    await _starts_late(kit, 30)


async def _starts_late(kit: Kit, seconds: float) -> None:
    kit.server.kill()
    worker = await kit.worker()
    await asyncio.sleep(seconds)
    assert len(worker.events()) <= 10
    assert len(worker.events("redis_unreachable")) == 1
    kit.server.start()
    daemon = await kit.daemon()
    await daemon.settle(candidates(2))


@slow_fault("24", "the server's memory is full", "CONFIG SET maxmemory 1, later 0", "waits, then goes on")
async def test_a_server_without_memory_is_waited_for(kit: Kit) -> None:
    many = candidates(6)
    daemon, (worker,) = await kit.started({"*": ["sleep:0.5"]})
    await daemon.issue(many)
    await kit.evaluating(many[1].id)
    await kit.redis.config_set("maxmemory", "1")
    await asyncio.sleep(LEASE)
    before = daemon.population.outcomes
    assert before <= 2
    await kit.redis.config_set("maxmemory", "0")
    await daemon.settled()
    assert len(worker.events("redis_unreachable")) <= 4


@fault("24", "a server that may evict", "maxmemory-policy allkeys-lru", "refused in one sentence")
async def test_a_worker_refuses_a_server_that_may_evict(kit: Kit) -> None:
    await kit.redis.config_set("maxmemory-policy", "allkeys-lru")
    worker = await kit.worker()
    assert await worker.ended() == 1
    (last,) = worker.events("ended")
    assert "noeviction" in last["error"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    with mounted(disk) as made:
        if made is None:
            pytest.skip("only root may make a small disk (mount -t tmpfs)")
        yield disk


@pytest.mark.parametrize("kind", ["valkey", "redis"])
@slow_fault("23", "the disk is full", "append-only file on a 2 MB disk", "waits, then goes on; nothing lost")
async def test_a_full_disk_is_waited_for(kind: str, small_disk: SmallDisk, tmp_path: Path) -> None:
    binary = server_binary(kind)
    if binary is None:
        pytest.skip("no redis-server on this machine")
    server = Server(binary, small_disk.folder, password=PASSWORD)
    server.start("--auto-aof-rewrite-percentage", "0")
    try:
        from tests.faults.kit import fault_kit

        async with fault_kit(server, tmp_path) as kit:
            kit.write_script({"*": ["sleep:0.3"]})
            daemon = await kit.daemon()
            worker = await kit.worker()
            many = candidates(8)
            await daemon.issue(many)
            await daemon.measured(2)
            small_disk.fill()
            await eventually(lambda: bool(worker.events("redis_unreachable")))
            before = daemon.population.outcomes
            small_disk.free()
            await daemon.settled()
            assert before < len(many)
    finally:
        server.kill()


@fault("28", "a second daemon", "take charge of a running search", "refused; the first goes on")
async def test_a_second_daemon_is_refused(kit: Kit) -> None:
    from daemon.state.store import SearchStore
    from protocol.errors import SearchExistsError
    from tests.support.samples import SPEC

    daemon = await kit.daemon()
    other: Redis = connect(kit.server.url)
    with pytest.raises(SearchExistsError, match="already run by"):
        await SearchStore(other, kit.keys, SPEC).take_charge()
    await other.aclose()
    await kit.worker()
    await daemon.settle(candidates(2))
