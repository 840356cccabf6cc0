"""The workers' end of the streams on real servers: deaths, hand-overs and clean-up."""

from structlog.testing import capture_logs

from protocol.plans.candidate import Failed
from protocol.queue.jobs import MOST_DEAD, RELEASED
from protocol.queue.keys import GROUP
from tests.support.samples import candidates, measured
from tests.support.servers import eventually
from tests.support.streams import Streams, claimed


async def consumers(streams: Streams) -> set[str]:
    return {consumer["name"] for consumer in await streams.redis.xinfo_consumers(streams.keys.jobs, GROUP)}


async def dead(streams: Streams) -> list[dict[str, str]]:
    return [fields for _, fields in await streams.redis.xrange(streams.keys.dead)]


async def test_a_job_whose_owners_died_three_times_is_given_up_and_listed(streams: Streams) -> None:
    one, two = candidates(2)
    await streams.queue.enqueue(one)
    for name in ("first", "second", "third"):
        assert (await claimed(streams.worker(name))).candidate == one
    await streams.queue.enqueue(two)
    last = streams.worker("last")

    async def given_up() -> bool:
        assert await last._take_over() is None
        return bool(await dead(streams))

    await eventually(given_up)
    (entry,) = await dead(streams)
    assert (entry["id"], entry["reason"], entry["worker"]) == (one.id, "poison", "third")
    (result,) = await streams.queue.results("0-0")
    assert result.id == one.id and isinstance(result.outcome, Failed) and result.outcome.reason == "crashed"
    assert (await claimed(last)).candidate == two


async def test_a_death_of_an_evaluation_process_is_counted_once_however_often_it_is_told(streams: Streams) -> None:
    one = await streams.enqueued()
    jobs = streams.worker()
    job = await claimed(jobs)
    assert [await jobs.count_death(job, name) for name in ("a", "a")] == [1, 1]
    taken = await claimed(streams.worker("w2"))  # w1 shows no sign of life
    assert await jobs.count_death(job, "b") == 2  # no longer its own: the take-over was the second
    await jobs.commit(taken, measured(5.0, one))
    assert not await streams.redis.exists(streams.keys.deaths)


async def test_handing_back_is_no_death(streams: Streams) -> None:
    one = await streams.enqueued()
    for name in ("w1", "w2", "w3", "w4", "w5"):
        jobs = streams.worker(name, lease=30)
        assert (await claimed(jobs)).candidate == one
        await jobs.release()
    assert not await streams.redis.exists(streams.keys.deaths, streams.keys.dead)
    assert await consumers(streams) == {RELEASED}


async def test_a_second_pending_job_of_a_busy_worker_goes_to_another(streams: Streams) -> None:
    running, stranded = candidates(2)
    await streams.queue.enqueue(running)
    jobs, other = streams.worker("busy", lease=30), streams.worker("other", lease=30)
    job = await claimed(jobs)
    await streams.queue.enqueue(stranded)
    await streams.redis.xreadgroup(GROUP, "busy", {streams.keys.jobs: ">"}, count=1)  # a reply that got lost
    assert await jobs.beat(job, "{}")
    assert (await claimed(other)).candidate == stranded
    assert await jobs.beat(job, "{}")
    assert await jobs.commit(job, measured(5.0, running))


async def test_dead_consumers_are_deleted_once_nothing_is_pending_with_them(streams: Streams) -> None:
    one = await streams.enqueued()
    gone, living = streams.worker("gone"), streams.worker("living")
    await claimed(gone)
    assert await consumers(streams) == {"gone"}
    job = await claimed(living)
    await living.commit(job, measured(5.0, one))

    async def forgotten() -> bool:
        await living.beat(None, "{}")
        await living.claim()
        return "gone" not in await consumers(streams)

    await eventually(forgotten)


async def test_the_list_of_the_dead_is_bounded(streams: Streams) -> None:
    pipe = streams.redis.pipeline()
    for _ in range(MOST_DEAD + 5):
        pipe.xadd(streams.keys.dead, {"id": "x"})
    await pipe.execute()
    await streams.redis.xadd(streams.keys.jobs, {"nothing": "of ours"})
    jobs = streams.worker()
    while await streams.jobs():
        await jobs.claim()
    entries = await dead(streams)
    assert len(entries) == MOST_DEAD and entries[-1]["reason"] == "unreadable"


async def test_an_outcome_that_was_applied_long_ago_is_still_the_only_one(streams: Streams) -> None:
    one = await streams.enqueued()
    early, late = streams.worker("early"), streams.worker("late")
    job = await claimed(early)
    taken = await claimed(late)
    assert await late.commit(taken, measured(5.0, one))
    (result,) = await streams.queue.results("0-0")
    assert await streams.queue.apply(result)
    assert not await streams.redis.exists(streams.keys.done)
    assert not await early.commit(job, measured(9.0, one))
    assert not await streams.queue.requeue(one.id)
    assert await streams.queue.results("0-0") == []


async def test_a_new_group_is_logged_as_info_and_a_lost_one_as_warning(streams: Streams) -> None:
    claimer = streams.worker("a")
    with capture_logs() as events:
        for _ in range(2):
            await claimer.claim()
        await streams.redis.delete(streams.keys.jobs)
        await claimer.claim()
    told = [(event["event"], event["log_level"]) for event in events]
    assert told == [("group_created", "info"), ("group_lost", "warning")]
