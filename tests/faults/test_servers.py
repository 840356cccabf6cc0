"""Faults of the server, of its data, and of the way to it."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis

from daemon import embedded
from protocol.candidate import Candidate, Failed, Measured
from protocol.connection import connect
from protocol.errors import SelfPrunerError
from protocol.jobs import JobQueue
from protocol.keys import GROUP
from tests.disks import SmallDisk, mounted
from tests.faults.kit import LEASE, PASSWORD, Daemon, Kit, candidates, eventually
from tests.faults.proxy import Proxy
from tests.servers import Server, server_binary


@pytest.mark.faults
@pytest.mark.fault("13", "cancelled reads", "300 claims cancelled at any moment", "nothing stranded")
async def test_reads_that_are_cancelled_strand_nothing(kit: Kit) -> None:
    daemon = await kit.daemon()
    jobs = JobQueue(kit.redis, kit.keys, "cancelled", lease_seconds=LEASE)
    many = candidates(300)
    for number, each in enumerate(many):
        reading = asyncio.create_task(jobs.claim())
        await asyncio.sleep(0.0005 * (number % 7))
        await daemon.issue([each])
        await asyncio.sleep(0.0005 * (number % 5))
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    await kit.worker()

    async def beat_for_ever() -> None:
        while True:  # alive, and so what is pending with it is its own to find
            await jobs.beat(None, "{}")
            if job := await jobs.claim():
                await jobs.commit(job, Failed(reason="timeout"))

    beating = asyncio.create_task(beat_for_ever())
    await daemon.settled()
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    await jobs.release()


@pytest.mark.faults
@pytest.mark.fault(
    "15", "the server is killed in mid-evaluation", "SIGKILL, down for 2 leases, start", "evaluated once"
)
async def test_a_server_that_is_away_for_longer_than_a_lease_costs_no_second_evaluation(kit: Kit) -> None:
    one, *others = candidates(3)
    kit.write_script({one.id: [f"sleep:{4 * LEASE}"]})
    daemon = await kit.daemon()
    for _ in range(2):
        await kit.worker()
    await daemon.issue([one, *others])
    await kit.evaluating(one.id)
    await daemon.measured(2)
    kit.server.kill()
    await asyncio.sleep(2 * LEASE)
    kit.server.start()
    await daemon.settled()
    assert kit.evaluations[one.id] == 1


@pytest.mark.faults
@pytest.mark.fault("16", "the server stands still while enqueueing", "SIGSTOP for 12 s", "one entry for each id")
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


@pytest.mark.faults
@pytest.mark.fault("17", "no server at the start", "started 4 s late", "waits, tells it once, then works")
async def test_a_worker_waits_for_a_server_that_is_started_late(kit: Kit) -> None:
    await _starts_late(kit, 4)


@pytest.mark.faults
@pytest.mark.fault("17", "no server at the start for long", "started 30 s late", "at most 10 log lines, then works")
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
    await daemon.issue(candidates(2))
    await daemon.settled()


@pytest.mark.fault("18", "the data is gone in mid-search", "FLUSHALL", "told loudly, restored, no hot loop")
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
        assert len(worker.events("group_created")) <= 3
    fresh = Daemon(kit.redis, kit.keys)
    await fresh.begin()
    assert list(fresh.ledger.values()) == many
    await fresh.end()


@pytest.mark.faults
@pytest.mark.fault("18", "the data is gone again and again", "FLUSHALL every 0.5 s, 10 times", "restored each time")
async def test_a_server_that_is_flushed_again_and_again_ends_with_every_outcome(kit: Kit) -> None:
    many = candidates(30)
    kit.write_script({"*": ["sleep:0.2"]})
    kit.disturbed["*"] = 10
    daemon = await kit.daemon()
    worker = await kit.worker()
    await daemon.issue(many)
    for _ in range(10):
        await asyncio.sleep(0.5)
        await kit.redis.flushall()
    await daemon.settled()
    assert len(worker.events("group_created")) <= 12


@pytest.mark.parametrize(
    "loss", [pytest.param("group", marks=pytest.mark.faults), "stream", pytest.param("trim", marks=pytest.mark.faults)]
)
@pytest.mark.fault(
    "19", "group or stream gone, stream trimmed", "XGROUP DESTROY, DEL, XTRIM 0", "heals, one outcome each"
)
async def test_a_lost_group_stream_or_entry_heals_by_itself(kit: Kit, loss: str) -> None:
    many = candidates(6)
    kit.write_script({many[0].id: ["sleep:2"]})
    kit.disturbed["*"] = 1
    daemon = await kit.daemon()
    worker = await kit.worker()
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


@pytest.mark.faults
@pytest.mark.fault("20", "ghosts: pending entries without a body", "a dead owner; XTRIM 0", "gone with their consumer")
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


@pytest.mark.fault("21", "the append-only file is cut", "7 bytes off its end, after SIGKILL", "starts, nothing lost")
async def test_an_append_only_file_without_its_end_loses_nothing(kit: Kit) -> None:
    many = candidates(6)
    kit.disturbed["*"] = 1
    daemon = await kit.daemon()
    await kit.worker()
    await daemon.issue(many[:3])
    await daemon.measured(3)
    kit.server.kill()
    (tail,) = (kit.server.folder / "appendonlydir").glob("*.incr.aof")
    with tail.open("r+b") as file:
        file.truncate(tail.stat().st_size - 7)
    kit.server.start()
    await daemon.issue(many[3:])
    await daemon.settled()


@pytest.mark.fault(
    "21", "the append-only file is damaged", "its middle zeroed, embedded server", "refused, file and fix named"
)
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


@pytest.mark.faults
@pytest.mark.fault(
    "22", "the server runs on an older copy", "append-only folder put back", "reconciled, none applied twice"
)
async def test_a_server_on_an_older_copy_of_its_data_is_reconciled(kit: Kit) -> None:
    many = candidates(9)
    kit.disturbed["*"] = 1
    daemon = await kit.daemon()
    await kit.worker()
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
        await daemon.issue(many[6:])
        await daemon.settled()
        await kit.end()
    assert [event["event"] for event in events].count("redis_lost_data") == 1


@pytest.mark.faults
@pytest.mark.fault("24", "the server's memory is full", "CONFIG SET maxmemory 1, later 0", "waits, then goes on")
async def test_a_server_without_memory_is_waited_for(kit: Kit) -> None:
    many = candidates(6)
    kit.write_script({"*": ["sleep:0.5"]})
    daemon = await kit.daemon()
    worker = await kit.worker()
    await daemon.issue(many)
    await kit.evaluating(many[1].id)
    await kit.redis.config_set("maxmemory", "1")
    await asyncio.sleep(LEASE)
    before = daemon.population.outcomes
    assert before <= 2
    await kit.redis.config_set("maxmemory", "0")
    await daemon.settled()
    assert len(worker.events("redis_unreachable")) <= 4


@pytest.mark.fault("24", "a server that may evict", "maxmemory-policy allkeys-lru", "refused in one sentence")
async def test_a_worker_refuses_a_server_that_may_evict(kit: Kit) -> None:
    await kit.redis.config_set("maxmemory-policy", "allkeys-lru")
    worker = await kit.worker()
    assert await worker.ended() == 1
    (last,) = worker.events("ended")
    assert "noeviction" in last["error"]


@pytest.mark.faults
@pytest.mark.fault("25", "connections are cut", "CLIENT KILL every 0.3 s, 10 times", "completes, no connection leaks")
async def test_connections_that_are_cut_cost_nothing(kit: Kit) -> None:
    await _cut_connections(kit, times=10, every=0.3)


@pytest.mark.faults
@pytest.mark.fault("25", "connections are cut for long", "CLIENT KILL every second, 30 times", "completes, none leaks")
async def test_connections_that_are_cut_for_long_cost_nothing(kit: Kit) -> None:
    await _cut_connections(kit, times=30, every=1)


async def _cut_connections(kit: Kit, *, times: int, every: float) -> None:
    many = candidates(40)
    kit.write_script({"*": ["sleep:0.1"]})
    kit.disturbed["*"] = 1  # a claim whose reply is lost, and its lease too
    daemon = await kit.daemon()
    for _ in range(2):
        await kit.worker()
    killer = connect(kit.server.url)

    async def cut() -> None:
        for _ in range(times):
            await killer.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(every)

    cutting = asyncio.create_task(cut())
    for each in many:
        await daemon.issue([each])
        await asyncio.sleep(every / 8)
    await daemon.settled()
    await cutting
    await killer.aclose()


@pytest.mark.faults
@pytest.mark.fault("26", "a bad line", "proxy: 0.2 s latency, 5 % of blocks reset", "completes")
async def test_a_slow_line_that_is_cut_at_random_costs_nothing(kit: Kit) -> None:
    kit.disturbed["*"] = 3
    daemon = await kit.daemon()
    async with Proxy(kit.server.socket) as proxy:
        proxy.latency, proxy.cut_share = 0.2, 0.05
        for _ in range(2):
            await kit.worker(url=proxy.url(PASSWORD), lease_seconds=10)
        await daemon.issue(candidates(20))
        await daemon.settled(240)
        assert proxy.cuts
        await kit.end()


@pytest.mark.faults
@pytest.mark.fault("26", "a worker is cut off", "proxy: blackhole for 20 s", "loses its lease, one outcome")
async def test_a_worker_that_is_cut_off_loses_its_job_and_its_late_outcome_changes_nothing(kit: Kit) -> None:
    (one,) = candidates(1)
    kit.write_script({one.id: ["sleep:2", "instant"]})
    kit.disturbed[one.id] = 1
    daemon = await kit.daemon()
    async with Proxy(kit.server.socket) as proxy:
        first = await kit.worker(url=proxy.url(PASSWORD))
        await daemon.issue([one])
        await kit.evaluating(one.id)
        proxy.blackhole = True
        await kit.worker()
        await daemon.settled(19)
        await asyncio.sleep(20)
        proxy.blackhole = False

        async def late() -> bool:
            return [e["counts"] for e in first.events("outcome_committed")] == [False]

        await eventually(late)
        await kit.end()


@pytest.mark.faults
@pytest.mark.fault("27", "every job looks idle", "XCLAIM IDLE 1e6; server SIGSTOP 3 leases", "evaluated once")
async def test_jobs_that_look_idle_after_a_standstill_are_left_to_their_living_owners(kit: Kit) -> None:
    running = candidates(2)
    kit.write_script({each.id: [f"sleep:{6 * LEASE}"] for each in running})
    daemon = await kit.daemon()
    for _ in range(4):
        await kit.worker()
    await daemon.issue(running)
    for each in running:
        await kit.evaluating(each.id)
    for row in await kit.pending():
        await kit.redis.xclaim(
            kit.keys.jobs, GROUP, row["consumer"], 0, [row["message_id"]], idle=1_000_000, justid=True
        )
    await asyncio.sleep(LEASE)
    kit.server.freeze()
    await asyncio.sleep(3 * LEASE)
    kit.server.thaw()
    await daemon.settled()
    assert [kit.evaluations[each.id] for each in running] == [1, 1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    with mounted(disk) as made:
        if made is None:
            pytest.skip("only root may make a small disk (mount -t tmpfs)")
        yield disk


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["valkey", "redis"])
@pytest.mark.fault("23", "the disk is full", "append-only file on a 2 MB disk", "waits, then goes on; nothing lost")
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

            async def refuses() -> bool:
                return bool(worker.events("redis_unreachable"))

            await eventually(refuses)
            before = daemon.population.outcomes
            small_disk.free()
            await daemon.settled()
            assert before < len(many)
    finally:
        server.kill()


async def _results_by_hand(redis: Any, stream: str, known: Candidate) -> None:
    await redis.xadd(stream, {"id": known.id, "outcome": Failed(reason="timeout").model_dump_json()})
    await redis.xadd(stream, {"id": "0123456789abcdef", "outcome": Failed(reason="timeout").model_dump_json()})
    await redis.xadd(stream, {"id": known.id, "outcome": '{"kind": "measured", "version": 9}'})
    await redis.xadd(stream, {"id": known.id, "outcome": "\x00\xff garbage"})
    await redis.xadd(stream, {"nothing": "of ours"})


@pytest.mark.fault(
    "30", "results and jobs by another hand", "duplicate, unknown, wrong schema, garbage", "once, or dead"
)
async def test_garbage_in_the_streams_is_dropped_and_the_daemon_and_worker_go_on(kit: Kit) -> None:
    first, second = candidates(2)
    daemon = await kit.daemon()
    await kit.worker()
    await daemon.issue([first])
    await daemon.measured(1)
    await _results_by_hand(kit.redis, kit.keys.results, first)
    await kit.redis.xadd(kit.keys.jobs, {"id": "fedcba9876543210", "candidate": "{", "fingerprint": "x"})
    await kit.redis.xadd(kit.keys.jobs, {"nothing": "of ours"})
    await daemon.issue([second])
    await daemon.settled()
    assert isinstance(daemon.outcome(first), Measured) and isinstance(daemon.outcome(second), Measured)
    assert [dead["reason"] for dead in await kit.dead()] == ["unreadable", "unreadable"]


@pytest.mark.fault("28", "a second daemon", "take charge of a running search", "refused; the first goes on")
async def test_a_second_daemon_is_refused(kit: Kit) -> None:
    from daemon.store import SearchStore
    from protocol.errors import SearchExistsError
    from tests.samples import SPEC

    daemon = await kit.daemon()
    other: Redis = connect(kit.server.url)
    with pytest.raises(SearchExistsError, match="already run by"):
        await SearchStore(other, kit.keys, SPEC).take_charge()
    await other.aclose()
    await kit.worker()
    await daemon.issue(candidates(2))
    await daemon.settled()
