"""What a server loses while daemons and workers run, and how it comes back; who is in charge meanwhile."""

import asyncio
import json
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from daemon.state import store as store_module
from daemon.state.history import History, Memory
from daemon.state.restoring import Restorer
from daemon.state.store import SearchStore
from protocol.plans.candidate import Result
from protocol.queue.keys import Keys
from protocol.queue.streams import TakenOver
from protocol.queue.worker_status import read_workers
from tests.daemon.state.conftest import Begin, Commit
from tests.protocol.queue.test_streams import queued
from tests.support.samples import PROFILE, SPEC, candidates, measured


async def test_a_candidate_whose_committed_outcome_is_lost_is_measured_again(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin, commit: Commit
) -> None:
    queue, memory = await begin(2)
    lost = await commit(5.0)
    await redis.delete(keys.results)
    with capture_logs() as events:
        await store._check(queue, memory)
        await store._check(queue, memory)
    assert [(event["event"], event["count"]) for event in events] == [("candidates_requeued", 1)]
    await commit(6.0)
    assert await commit(7.0) == lost
    assert {result.id for result in await queue.results("9999999999999-0")} == {c.id for c in candidates(2)}


async def test_an_outcome_that_waits_to_be_applied_is_not_measured_again(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin, commit: Commit
) -> None:
    queue, memory = await begin(1)
    await commit(5.0)
    assert await store.repair(queue, memory().history) == 0
    assert await queued(redis, keys) == set()


@pytest.mark.parametrize("damage", ["spec", "issued", "applied"])
async def test_what_the_search_does_while_its_daemon_restores_is_not_lost(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The server still has this daemon's epoch, so that nothing but the restoring itself can hold its queue up."""
    queue, _ = await begin(2)
    early, other = [Result(f"{i}-1", c.id, measured(5.0, c)) for i, c in enumerate(candidates(2), 1)]
    await queue.apply(early)
    known = await store.history()
    late = candidates(3)[-1]
    write, busy = Restorer._write, list[asyncio.Task[bool]]()

    async def enqueue() -> bool:
        known.ledger[late.id] = late
        return await queue.enqueue(late)

    async def apply() -> bool:
        is_new = await queue.apply(other)
        known.outcomes[other.id] = other.outcome
        return is_new

    async def write_while_the_search_goes_on(self: Restorer, *args: Any) -> None:
        if not busy:
            busy.extend([asyncio.create_task(enqueue()), asyncio.create_task(apply())])
            await asyncio.wait(busy, timeout=1)
        await write(self, *args)

    monkeypatch.setattr(Restorer, "_write", write_while_the_search_goes_on)
    await redis.delete(keys[damage])
    await store._check(queue, lambda: Memory(known, PROFILE))
    async with asyncio.timeout(20):
        assert await asyncio.gather(*busy) == [True, True]
    found = await store.history()
    assert (found.ledger, found.outcomes) == (known.ledger, known.outcomes)
    assert len(found.ledger) == 3 and len(found.outcomes) == 2
    assert (queue.issued, queue.applied) == (3, 2)


async def test_what_a_server_did_after_it_came_back_with_this_daemons_epoch_is_not_replaced(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is restarted while the daemon restores, and its file lacks the last second: the queue is open again."""
    queue, _ = await begin(2)
    known = await store.history()
    late = candidates(3)[-1]
    client: Any = redis
    mine = await client.get(keys.epoch)
    write, done = Restorer._write, list[bool]()

    async def write_while_the_server_restarts(self: Restorer, *args: Any) -> None:
        if not done:
            await client.set(keys.epoch, mine)
            known.ledger[late.id] = late
            done.append(await queue.enqueue(late))
        await write(self, *args)

    monkeypatch.setattr(Restorer, "_write", write_while_the_server_restarts)
    await redis.delete(keys.spec)
    await store._check(queue, lambda: Memory(known, PROFILE))
    assert done == [True]
    assert list((await store.history()).ledger) == [c.id for c in candidates(3)]


async def test_an_older_copy_from_before_this_daemon_is_brought_up_to_date_and_is_no_takeover(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin
) -> None:
    queue, memory = await begin(3)
    late = candidates(4)[-1]
    client: Any = redis
    mine = await client.get(keys.epoch)
    await redis.flushall()
    await client.set(keys.epoch, int(mine) - 1)
    await client.set(keys.spec, SPEC.model_copy(update={"model": "no/such-model"}).model_dump_json())
    living = asyncio.create_task(store.stay_in_charge(queue, memory))
    async with asyncio.timeout(20):
        assert await queue.enqueue(late)
    living.cancel()
    assert list((await store.history()).ledger) == [c.id for c in candidates(4)]
    assert await client.get(keys.epoch) == mine
    assert await client.get(keys.spec) == SPEC.model_dump_json()


@pytest.mark.parametrize("epoch", ["abc", "1e308", "-5", "9" * 400, b"\xff"])
async def test_an_epoch_or_a_spec_by_another_hand_is_replaced_by_the_daemons_own(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin, epoch: str | bytes
) -> None:
    queue, memory = await begin(3)
    client: Any = redis
    mine = await client.get(keys.epoch)
    await client.set(keys.epoch, epoch)
    await client.set(keys.spec, b"\xff")
    living = asyncio.create_task(store.stay_in_charge(queue, memory))
    async with asyncio.timeout(20):
        assert await queue.enqueue(candidates(4)[-1])
    living.cancel()
    assert await client.get(keys.epoch) == mine
    assert await client.get(keys.spec) == SPEC.model_dump_json()
    assert len((await store.history()).ledger) == 4


async def test_a_command_that_was_given_after_the_loss_is_kept_and_one_of_an_older_copy_is_not(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin
) -> None:
    queue, memory = await begin(1)
    paused = Memory(memory().history, PROFILE, "pause")
    client: Any = redis
    mine = int(await client.get(keys.epoch))
    for epoch, given, stays in ((None, None, "pause"), (None, "run", "run"), (mine - 1, "run", "pause")):
        await redis.flushall()
        if epoch:
            await client.set(keys.epoch, epoch)
        if given:
            await client.set(keys.control, given)
        await store.restore(queue, lambda: paused, from_="the test")
        assert await client.get(keys.control) == stays


async def test_of_two_daemons_the_one_that_began_after_a_flush_stays_in_charge(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin
) -> None:
    queue, memory = await begin(3)
    await redis.flushall()
    second = await SearchStore(redis, keys, SPEC).take_charge(previous_is_dead=True)
    with pytest.raises(TakenOver):
        async with asyncio.timeout(20):
            await store.stay_in_charge(queue, memory)
    with pytest.raises(TakenOver):
        await queue.enqueue(candidates(4)[-1])
    assert await second.enqueue(candidates(1)[0])


async def test_an_epoch_is_higher_than_the_one_before_even_where_the_clock_is_behind_it(
    redis: Redis, keys: Keys, store: SearchStore
) -> None:
    client: Any = redis
    await client.set(keys.epoch, 2**52)
    await store.take_charge()
    assert await client.get(keys.epoch) == str(2**52 + 1)


async def test_a_daemon_that_was_replaced_can_neither_drop_an_outcome_nor_choose_parents(
    redis: Redis, keys: Keys, begin: Begin, commit: Commit
) -> None:
    queue, _ = await begin(1)
    await commit(5.0)
    (result,) = await queue.results("0-0")
    await SearchStore(redis, keys, SPEC).take_charge(previous_is_dead=True)
    with pytest.raises(TakenOver):
        await queue.drop(result)
    with pytest.raises(TakenOver):
        await queue.remember_selection(1, ["a"])
    client: Any = redis
    assert await client.xlen(keys.results) == await client.hlen(keys.done) == 1
    assert not await redis.exists(keys.selections)


async def test_the_parents_that_are_kept_are_those_that_were_chosen_first(store: SearchStore, begin: Begin) -> None:
    queue, _ = await begin(1)
    assert await queue.remember_selection(1, ["a", "b"]) == ("a", "b")
    assert await queue.remember_selection(1, ["c"]) == ("a", "b")
    assert (await store.history()).selections == {1: ("a", "b")}


async def test_an_outcome_that_an_older_copy_took_again_costs_one_restoring_and_no_more(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin
) -> None:
    queue, _ = await begin(2)
    results = [Result(f"{i}-1", c.id, measured(5.0, c)) for i, c in enumerate(candidates(2), 1)]
    for result in results:
        await queue.apply(result)
    history = await store.history()
    client: Any = redis
    await client.hdel(keys.outcomes, results[1].id)
    await client.rpop(keys.applied)
    assert await queue.apply(results[1])
    with capture_logs() as events:
        for _ in range(3):
            await store._check(queue, lambda: Memory(history, PROFILE))
    assert [event["event"] for event in events] == ["redis_lost_data"]
    assert await client.lrange(keys.applied, 0, -1) == [result.id for result in results]


async def test_a_repair_of_a_server_that_is_flushed_meanwhile_waits_for_nobody(
    redis: Redis, store: SearchStore, begin: Begin
) -> None:
    queue, memory = await begin(2)
    await redis.flushall()
    async with asyncio.timeout(20):  # only who calls it restores the data that it would wait for
        assert await store.repair(queue, memory().history) == 0


async def test_a_worker_whose_status_cannot_be_read_hides_no_other_and_is_told_of_once(
    redis: Redis, keys: Keys, store: SearchStore
) -> None:
    await redis.set(keys.worker("x"), '{"state":"v2"}')
    await redis.set(keys.worker("y"), json.dumps({"stage": "idle"}))
    with capture_logs() as events:
        seen = [[worker.consumer for worker in await store.workers()] for _ in range(3)]
    assert seen == [["y"]] * 3
    assert [(event["event"], event["worker"]) for event in events] == [("worker_unreadable", "x")]
    assert (await read_workers(redis, keys)).unreadable == {"x"}


async def test_lost_jobs_are_put_back_without_reading_the_history(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, memory = await begin(3)

    async def refused(*_: object) -> History:
        raise AssertionError("the whole history was read")

    monkeypatch.setattr(store_module, "load_history", refused)
    await redis.delete(keys.jobs)
    await store._check(queue, memory)
    assert await queued(redis, keys) == {c.id for c in candidates(3)}
