"""Faults of the connection to the server, and of its clock."""

import asyncio

from protocol.plans.candidate import Failed
from protocol.queue.connection import connect
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import GROUP
from tests.faults.kit import LEASE, PASSWORD, Kit, candidates, eventually
from tests.faults.marks import slow_fault
from tests.faults.proxy import Proxy


@slow_fault("13", "cancelled reads", "300 claims cancelled at any moment", "nothing stranded")
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


@slow_fault("25", "connections are cut", "CLIENT KILL every 0.3 s, 10 times", "completes, no connection leaks")
async def test_connections_that_are_cut_cost_nothing(kit: Kit) -> None:
    await _cut_connections(kit, times=10, every=0.3)


@slow_fault("25", "connections are cut for long", "CLIENT KILL every second, 30 times", "completes, none leaks")
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


@slow_fault("26", "a bad line", "proxy: 0.2 s latency, 5 % of blocks reset", "completes")
async def test_a_slow_line_that_is_cut_at_random_costs_nothing(kit: Kit) -> None:
    kit.disturbed["*"] = 3
    daemon = await kit.daemon()
    async with Proxy(kit.server.socket) as proxy:
        proxy.latency, proxy.cut_share = 0.2, 0.05
        for _ in range(2):
            await kit.worker(url=proxy.url(PASSWORD), lease_seconds=10)
        await daemon.settle(candidates(20), 240)
        assert proxy.cuts
        await kit.end()


@slow_fault("26", "a worker is cut off", "proxy: blackhole for 20 s", "loses its lease, one outcome")
async def test_a_worker_that_is_cut_off_loses_its_job_and_its_late_outcome_changes_nothing(kit: Kit) -> None:
    (one,) = candidates(1)
    kit.write_script({one.id: ["sleep:2", "instant"]})
    kit.disturbed[one.id] = 1
    daemon = await kit.daemon()
    async with Proxy(kit.server.socket) as proxy:
        first = await kit.worker(url=proxy.url(PASSWORD))
        await kit.begun(daemon, one)
        proxy.blackhole = True
        await kit.worker()
        await daemon.settled(19)
        await asyncio.sleep(20)
        proxy.blackhole = False
        await eventually(lambda: [e["counts"] for e in first.events("outcome_committed")] == [False])
        await kit.end()


@slow_fault("27", "every job looks idle", "XCLAIM IDLE 1e6; server SIGSTOP 3 leases", "evaluated once")
async def test_jobs_that_look_idle_after_a_standstill_are_left_to_their_living_owners(kit: Kit) -> None:
    running = candidates(2)
    daemon, _ = await kit.started({each.id: [f"sleep:{6 * LEASE}"] for each in running}, workers=4)
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
