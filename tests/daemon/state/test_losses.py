"""What a server loses while daemons and workers run, and how it comes back; who is in charge meanwhile."""

import asyncio
import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from daemon.state import store as store_module
from daemon.state.history import History, Memory
from daemon.state.restoring import Restorer
from protocol.plans.candidate import KeptSelection, Result
from protocol.queue.streams import TakenOver
from protocol.queue.worker_status import read_workers
from tests.daemon.state.conftest import State
from tests.support.samples import PROFILE, SPEC, candidates, measured


async def test_a_candidate_whose_committed_outcome_is_lost_is_measured_again(it: State) -> None:
    queue, memory = await it.begin(2)
    lost = await it.commit(5.0)
    await it.redis.delete(it.keys.results)
    with capture_logs() as events:
        await it.store._check(queue, memory)
        await it.store._check(queue, memory)
    assert [(event["event"], event["count"]) for event in events] == [("candidates_requeued", 1)]
    await it.commit(6.0)
    assert await it.commit(7.0) == lost
    assert {result.id for result in await queue.results("9999999999999-0")} == {c.id for c in candidates(2)}


async def test_an_outcome_that_waits_to_be_applied_is_not_measured_again(it: State) -> None:
    queue, memory = await it.begin(1)
    await it.commit(5.0)
    assert await it.store.repair(queue, memory().history) == 0
    assert await it.queued() == set()


@pytest.mark.parametrize("damage", ["spec", "issued", "applied"])
async def test_what_the_search_does_while_its_daemon_restores_is_not_lost(
    it: State, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The server still has this daemon's epoch, so that nothing but the restoring itself can hold its queue up."""
    queue, _ = await it.begin(2)
    early, other = [Result(f"{i}-1", c.id, measured(5.0, c)) for i, c in enumerate(candidates(2), 1)]
    await queue.apply(early)
    known = await it.store.history()
    late = candidates(3)[-1]
    write, busy = Restorer._write, list[asyncio.Task[bool]]()

    async def enqueue() -> bool:
        known.ledger[late.id] = late
        return await queue.enqueue(late)

    async def apply() -> bool:
        is_new = await queue.apply(other)
        known.population.insert(known.ledger[other.id], other.outcome)
        return is_new

    async def write_while_the_search_goes_on(self: Restorer, *args: Any) -> None:
        if not busy:
            busy.extend([asyncio.create_task(enqueue()), asyncio.create_task(apply())])
            await asyncio.wait(busy, timeout=1)
        await write(self, *args)

    monkeypatch.setattr(Restorer, "_write", write_while_the_search_goes_on)
    await it.redis.delete(it.keys[damage])
    await it.store._check(queue, lambda: Memory(known, PROFILE))
    async with asyncio.timeout(20):
        assert await asyncio.gather(*busy) == [True, True]
    found = await it.store.history()
    assert (found.ledger, list(found.population)) == (known.ledger, list(known.population))
    assert len(found.ledger) == 3 and len(found.population) == 2
    assert (queue.issued, queue.applied) == (3, 2)


async def test_what_a_server_did_after_it_came_back_with_this_daemons_epoch_is_not_replaced(
    it: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is restarted while the daemon restores, and its file lacks the last second: the queue is open again."""
    queue, _ = await it.begin(2)
    known = await it.store.history()
    late = candidates(3)[-1]
    mine = await it.redis.get(it.keys.epoch)
    write, done = Restorer._write, list[bool]()

    async def write_while_the_server_restarts(self: Restorer, *args: Any) -> None:
        if not done:
            await it.redis.set(it.keys.epoch, mine)
            known.ledger[late.id] = late
            done.append(await queue.enqueue(late))
        await write(self, *args)

    monkeypatch.setattr(Restorer, "_write", write_while_the_server_restarts)
    await it.redis.delete(it.keys.spec)
    await it.store._check(queue, lambda: Memory(known, PROFILE))
    assert done == [True]
    assert list((await it.store.history()).ledger) == [c.id for c in candidates(3)]


async def test_an_older_copy_from_before_this_daemon_is_brought_up_to_date_and_is_no_takeover(it: State) -> None:
    queue, memory = await it.begin(3)
    late = candidates(4)[-1]
    mine = await it.redis.get(it.keys.epoch)
    await it.redis.flushall()
    await it.redis.set(it.keys.epoch, int(mine) - 1)
    await it.redis.set(it.keys.spec, SPEC.model_copy(update={"model": "no/such-model"}).model_dump_json())
    living = asyncio.create_task(it.store.stay_in_charge(queue, memory))
    async with asyncio.timeout(20):
        assert await queue.enqueue(late)
    living.cancel()
    assert list((await it.store.history()).ledger) == [c.id for c in candidates(4)]
    assert await it.redis.get(it.keys.epoch) == mine
    assert await it.redis.get(it.keys.spec) == SPEC.model_dump_json()


@pytest.mark.parametrize("epoch", ["abc", "1e308", "-5", "9" * 400, b"\xff"])
async def test_an_epoch_or_a_spec_by_another_hand_is_replaced_by_the_daemons_own(it: State, epoch: str | bytes) -> None:
    queue, memory = await it.begin(3)
    mine = await it.redis.get(it.keys.epoch)
    await it.redis.set(it.keys.epoch, epoch)
    await it.redis.set(it.keys.spec, b"\xff")
    living = asyncio.create_task(it.store.stay_in_charge(queue, memory))
    async with asyncio.timeout(20):
        assert await queue.enqueue(candidates(4)[-1])
    living.cancel()
    assert await it.redis.get(it.keys.epoch) == mine
    assert await it.redis.get(it.keys.spec) == SPEC.model_dump_json()
    assert len((await it.store.history()).ledger) == 4


async def test_a_command_that_was_given_after_the_loss_is_kept_and_one_of_an_older_copy_is_not(it: State) -> None:
    queue, memory = await it.begin(1)
    paused = Memory(memory().history, PROFILE, "pause")
    mine = int(await it.redis.get(it.keys.epoch))
    for epoch, given, stays in ((None, None, "pause"), (None, "run", "run"), (mine - 1, "run", "pause")):
        await it.redis.flushall()
        if epoch:
            await it.redis.set(it.keys.epoch, epoch)
        if given:
            await it.redis.set(it.keys.control, given)
        await it.store.restore(queue, lambda: paused, from_="the test")
        assert await it.redis.get(it.keys.control) == stays


async def test_of_two_daemons_the_one_that_began_after_a_flush_stays_in_charge(it: State) -> None:
    queue, memory = await it.begin(3)
    await it.redis.flushall()
    second = await it.succeed()
    with pytest.raises(TakenOver):
        async with asyncio.timeout(20):
            await it.store.stay_in_charge(queue, memory)
    with pytest.raises(TakenOver):
        await queue.enqueue(candidates(4)[-1])
    assert await second.enqueue(candidates(1)[0])


async def test_an_epoch_is_higher_than_the_one_before_even_where_the_clock_is_behind_it(it: State) -> None:
    await it.redis.set(it.keys.epoch, 2**52)
    await it.store.take_charge()
    assert await it.redis.get(it.keys.epoch) == str(2**52 + 1)


async def test_a_daemon_that_was_replaced_can_neither_drop_an_outcome_nor_choose_parents(it: State) -> None:
    queue, _ = await it.begin(1)
    await it.commit(5.0)
    (result,) = await queue.results("0-0")
    await it.succeed()
    with pytest.raises(TakenOver):
        await queue.drop(result)
    with pytest.raises(TakenOver):
        await queue.remember_selection(1, KeptSelection(parents=("a",)))
    assert await it.redis.xlen(it.keys.results) == await it.redis.hlen(it.keys.done) == 1
    assert not await it.redis.exists(it.keys.selections)


async def test_the_parents_that_are_kept_are_those_that_were_chosen_first(it: State) -> None:
    queue, _ = await it.begin(1)
    first = KeptSelection(parents=("a", "b"), step="rules")
    assert await queue.remember_selection(1, first) == first
    assert await queue.remember_selection(1, KeptSelection(parents=("c",))) == first
    assert (await it.store.history()).selections == {1: first}


async def test_an_outcome_that_an_older_copy_took_again_costs_one_restoring_and_no_more(it: State) -> None:
    queue, _ = await it.begin(2)
    results = [Result(f"{i}-1", c.id, measured(5.0, c)) for i, c in enumerate(candidates(2), 1)]
    for result in results:
        await queue.apply(result)
    history = await it.store.history()
    await it.redis.hdel(it.keys.outcomes, results[1].id)
    await it.redis.rpop(it.keys.applied)
    assert await queue.apply(results[1])
    with capture_logs() as events:
        for _ in range(3):
            await it.store._check(queue, lambda: Memory(history, PROFILE))
    assert [event["event"] for event in events] == ["redis_lost_data"]
    assert await it.redis.lrange(it.keys.applied, 0, -1) == [result.id for result in results]


async def test_a_repair_of_a_server_that_is_flushed_meanwhile_waits_for_nobody(it: State) -> None:
    queue, memory = await it.begin(2)
    await it.redis.flushall()
    async with asyncio.timeout(20):  # only who calls it restores the data that it would wait for
        assert await it.store.repair(queue, memory().history) == 0


async def test_a_worker_whose_status_cannot_be_read_hides_no_other_and_is_told_of_once(it: State) -> None:
    await it.redis.set(it.keys.worker("x"), '{"state":"v2"}')
    await it.redis.set(it.keys.worker("y"), json.dumps({"stage": "idle"}))
    with capture_logs() as events:
        seen = [[worker.consumer for worker in await it.store.workers()] for _ in range(3)]
    assert seen == [["y"]] * 3
    assert [(event["event"], event["worker"]) for event in events] == [("worker_unreadable", "x")]
    assert (await read_workers(it.redis, it.keys)).unreadable == {"x"}


async def test_lost_jobs_are_put_back_without_reading_the_history(it: State, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, memory = await it.begin(3)

    async def refused(*_: object) -> History:
        raise AssertionError("the whole history was read")

    monkeypatch.setattr(store_module, "load_history", refused)
    await it.redis.delete(it.keys.jobs)
    await it.store._check(queue, memory)
    assert await it.queued() == {c.id for c in candidates(3)}
