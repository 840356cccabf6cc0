"""The streams on real servers: at least once delivered, once in effect."""

import asyncio

import pytest
from redis.asyncio import Redis

from protocol.plans.candidate import Failed, Result
from protocol.queue.connection import connect
from protocol.queue.keys import GROUP, Keys
from protocol.queue.streams import CandidateQueue, TakenOver
from tests.support.samples import SPEC, candidates, measured
from tests.support.servers import Server, eventually
from tests.support.streams import LEASE, Streams, claimed, queued


async def test_a_candidate_travels_from_the_daemon_to_a_worker_and_its_outcome_back(streams: Streams) -> None:
    one, jobs = await streams.enqueued(), streams.worker()
    job = await claimed(jobs)
    assert (job.candidate, job.fingerprint) == (one, SPEC.fingerprint)
    assert await jobs.commit(job, measured(12.5, one))
    (result,) = await streams.queue.results("0-0")
    assert (result.id, result.outcome) == (one.id, measured(12.5, one))
    assert await streams.queue.apply(result)
    assert await streams.jobs() == await streams.redis.xlen(streams.keys.results) == 0


async def test_enqueueing_twice_leaves_one_entry(streams: Streams) -> None:
    (one,) = candidates(1)
    assert [await streams.queue.enqueue(one), await streams.queue.enqueue(one)] == [True, False]
    assert await streams.jobs() == 1


async def test_a_daemon_that_was_replaced_can_neither_enqueue_nor_apply(streams: Streams) -> None:
    (one,) = candidates(1)
    await streams.redis.incr(streams.keys.epoch)
    with pytest.raises(TakenOver):
        await streams.queue.enqueue(one)
    with pytest.raises(TakenOver):
        await streams.queue.apply(Result("1-1", one.id, measured(3.0, one)))
    assert not await streams.redis.exists(streams.keys.jobs, streams.keys.outcomes)


async def test_the_first_outcome_of_an_id_counts_whoever_comes_later(streams: Streams) -> None:
    one = await streams.enqueued()
    jobs = streams.worker()
    job = await claimed(jobs)
    assert await jobs.commit(job, measured(5.0, one))
    assert not await streams.worker("w2").commit(job, measured(6.0, one))
    assert [r.outcome for r in await streams.queue.results("0-0")] == [measured(5.0, one)]


async def test_an_outcome_is_applied_once(streams: Streams) -> None:
    (one,) = candidates(1)
    result = Result("5-1", one.id, measured(5.0, one))
    assert [await streams.queue.apply(result), await streams.queue.apply(result)] == [True, False]
    assert await streams.redis.lrange(streams.keys.applied, 0, -1) == [one.id]


async def test_a_dead_workers_job_goes_to_another(streams: Streams) -> None:
    one = await streams.enqueued()
    dead, living = streams.worker("dead"), streams.worker("living")
    job = await claimed(dead)
    await dead.beat(job, "{}")
    taken = await claimed(living)
    assert taken.candidate == one
    assert await living.commit(taken, measured(4.0, one))
    assert not await dead.commit(job, measured(9.0, one))


async def test_a_beating_workers_job_stays_its_own_for_many_leases(streams: Streams) -> None:
    await streams.enqueued()
    slow, idle = streams.worker("slow"), streams.worker("idle")
    job = await claimed(slow)
    for _ in range(12):
        assert await slow.beat(job, "{}")
        assert await asyncio.wait_for(idle._take_over(), 5) is None
        await asyncio.sleep(LEASE / 3)


async def test_an_owner_with_a_sign_of_life_is_safe_even_if_its_job_looks_idle(streams: Streams) -> None:
    await streams.enqueued()
    owner, other = streams.worker("owner", lease=30), streams.worker("other")
    job = await claimed(owner)
    await owner.beat(job, "{}")
    await streams.redis.xclaim(streams.keys.jobs, GROUP, "owner", 0, [job.message], idle=1_000_000, justid=True)
    await asyncio.sleep(2 * LEASE)
    assert await other._take_over() is None


async def test_a_job_is_taken_over_only_after_a_lease_on_the_claimers_own_clock_too(streams: Streams) -> None:
    """A step of the server's clock lets every lease run out, and every sign of life."""
    one = await streams.enqueued()
    owner, other = streams.worker("owner", lease=1.5), streams.worker("other", lease=1.5)
    job = await claimed(owner)

    async def step_the_clock() -> None:
        await streams.redis.xclaim(streams.keys.jobs, GROUP, "owner", 0, [job.message], idle=120_000, justid=True)
        await streams.redis.delete(streams.keys.worker("owner"))

    for _ in range(4):  # longer than a lease, with renewals
        await owner.beat(job, "{}")
        assert await other._take_over() is None
        await asyncio.sleep(0.5)
        await step_the_clock()
        assert await other._take_over() is None
    assert (await claimed(other)).candidate == one  # its lease is no longer renewed


async def test_jobs_of_an_owner_whose_name_is_not_text_are_taken_over(streams: Streams) -> None:
    one = await streams.enqueued()
    await streams.redis.xgroup_create(streams.keys.jobs, GROUP, id="0")
    await streams.redis.xreadgroup(GROUP, b"\xff\xfe", {streams.keys.jobs: ">"})
    assert (await claimed(streams.worker())).candidate == one


async def test_an_invalid_count_of_deaths_is_ignored(streams: Streams) -> None:
    one = await streams.enqueued()
    await streams.redis.hset(streams.keys.deaths, one.id, "abc")
    jobs = streams.worker("w1", lease=30)
    assert await jobs.count_death(await claimed(jobs), "a death") == 1


async def test_a_former_owners_beat_does_not_steal_the_job_back(streams: Streams) -> None:
    await streams.enqueued()
    former, new = streams.worker("former"), streams.worker("new")
    job = await claimed(former)
    taken = await claimed(new)
    assert not await former.beat(job, "{}")
    assert await new.beat(taken, "{}")


async def test_a_released_job_is_free_at_once(streams: Streams) -> None:
    await streams.enqueued()
    first, second = streams.worker("first", lease=30), streams.worker("second", lease=30)
    job = await claimed(first)
    await first.beat(job, "{}")
    assert await second._take_over() is None
    await first.release()
    assert await second._take_over() is not None


async def test_a_job_whose_delivery_got_lost_is_found_again_by_its_worker(streams: Streams) -> None:
    await streams.enqueued()
    jobs = streams.worker("w1", lease=30)
    assert await claimed(jobs) == await claimed(jobs)


async def test_nothing_is_taken_over_within_a_lease_of_an_outage(streams: Streams, server: Server) -> None:
    await streams.enqueued()
    owner, other = streams.worker("owner", lease=1), streams.worker("other", lease=1)
    await claimed(owner)
    assert await other.claim() is None
    server.kill()
    await asyncio.sleep(1.1)
    server.start()
    assert await other._take_over() is None  # the owner's sign of life ran out while nobody could renew it
    assert await claimed(other)


async def test_a_lost_stream_and_group_heal_and_the_ledger_brings_the_jobs_back(streams: Streams) -> None:
    one, two = candidates(2)
    await streams.queue.enqueue(one)
    await streams.queue.enqueue(two)
    jobs = streams.worker()
    await jobs.commit(await claimed(jobs), measured(5.0, one))
    await streams.redis.delete(streams.keys.jobs)
    assert await queued(streams.redis, streams.keys) == set()
    assert await streams.queue.requeue([one.id, two.id]) == 1
    assert await streams.queue.requeue([one.id, two.id]) == 0
    assert (await claimed(jobs)).candidate == two


async def test_an_unreadable_job_has_failed_and_the_next_one_is_served(streams: Streams) -> None:
    await streams.redis.xadd(streams.keys.jobs, {"id": "x", "candidate": "{not json", "fingerprint": "f"})
    await streams.redis.xadd(streams.keys.jobs, {"nothing": "of ours"})
    one = await streams.enqueued()
    assert (await claimed(streams.worker())).candidate == one
    assert await streams.jobs() == 1
    (result,) = await streams.queue.results("0-0")
    assert result.id == "x" and isinstance(result.outcome, Failed)


async def test_an_unreadable_result_has_failed_and_the_next_one_is_read(streams: Streams) -> None:
    (one,) = candidates(1)
    late = {"id": one.id, "outcome": Failed(reason="timeout").model_dump_json()}
    for fields in ({"id": one.id, "outcome": '{"kind":"measured","perplexity":NaN}'}, {"garbage": "1"}, late):
        await streams.redis.xadd(streams.keys.results, fields)
    outcomes = [r.outcome for r in await streams.queue.results("0-0")]
    assert [o.reason for o in outcomes if isinstance(o, Failed)] == ["invalid", "timeout"]
    assert await streams.redis.xlen(streams.keys.results) == 2


async def test_a_commit_waits_for_a_server_that_is_away_and_then_counts(streams: Streams, server: Server) -> None:
    one = await streams.enqueued()
    jobs = streams.worker()
    job = await claimed(jobs)
    server.kill()
    commit = asyncio.create_task(jobs.commit(job, measured(7.0, one)))
    await asyncio.sleep(0.3)
    assert not commit.done()
    server.start()
    assert await commit
    assert len(await streams.queue.results("0-0")) == 1


async def test_repeated_enqueues_while_connections_are_being_cut_leave_one_entry_each(
    streams: Streams, server: Server
) -> None:
    killer = connect(server.url)
    many, cuts, enough = candidates(10), 0, asyncio.Event()

    async def cut() -> None:
        nonlocal cuts
        while not enough.is_set():  # the client may lose a cancellation (see RedisRetry)
            await killer.client_kill_filter(_type="normal", skipme=True)
            cuts += 1
            await asyncio.sleep(0.01 * 1.02**cuts)  # ever seldomer: a busy machine needs longer between two of them

    cutting = asyncio.create_task(cut())
    while cuts < 3:  # a fast machine enqueues them all between two cuts
        await asyncio.gather(*(streams.queue.enqueue(c) for c in many for _ in range(5)))
    assert cuts > 1
    enough.set()
    await cutting
    await killer.aclose()
    await (
        streams.redis.connection_pool.disconnect()
    )  # the last cut has closed some, and nothing is retried from here on
    assert await streams.jobs() == len(many)
    assert await queued(streams.redis, streams.keys) == {c.id for c in many}


async def test_results_are_read_from_the_cursor_on(streams: Streams) -> None:
    one, two = candidates(2)
    jobs = streams.worker()
    for each in (one, two):
        await streams.queue.enqueue(each)
        await jobs.commit(await claimed(jobs), measured(5.0, each))
    first, second = await streams.queue.results("0-0")
    assert (first.id, second.id) == (one.id, two.id)
    assert [r.id for r in await streams.queue.results(first.cursor)] == [two.id]


async def test_a_worker_shows_its_status_for_one_lease_only(streams: Streams) -> None:
    await streams.worker().beat(None, '{"stage":"idle"}')
    assert await streams.redis.get(streams.keys.worker("w1")) == '{"stage":"idle"}'

    async def gone() -> bool:
        return not await streams.redis.exists(streams.keys.worker("w1"))

    await eventually(gone)


async def test_a_cancellation_at_any_moment_ends_a_reading_loop(server: Server, keys: Keys) -> None:
    async def read_for_ever(client: Redis) -> None:
        queue = CandidateQueue(client, keys, epoch=1, fingerprint="")
        while True:
            await queue.results("0-0")

    for milliseconds in (0, 1, 2, 3, 5, 8, 20):
        client = connect(server.url)  # a new connection each time: the first command also says hello
        reading = asyncio.create_task(read_for_ever(client))
        await asyncio.sleep(milliseconds / 1000)
        reading.cancel()
        done, _ = await asyncio.wait({reading}, timeout=10)
        assert done and reading.cancelled()
        await client.aclose()
