"""The durable state: who is in charge, and what a restart finds."""

import asyncio

import pytest

from daemon.state.history import HistoryReader, Memory
from protocol.errors import SearchExistsError, StoreError
from protocol.plans.candidate import KeptSelection
from protocol.queue.connection import check_server
from protocol.queue.streams import TakenOver, load_scripts
from tests.daemon.state.conftest import State
from tests.support.samples import PROFILE, SPEC, candidates, profile_for
from tests.support.servers import eventually


async def test_a_restart_finds_the_ledger_and_the_outcomes_in_their_order(it: State) -> None:
    queue, _ = await it.begin(6)
    for perplexity in (9.0, 8.0, 7.0):
        await it.commit(perplexity)
    for result in await queue.results("0-0"):
        await queue.apply(result)

    second = it.other()
    await second.take_charge(previous_is_dead=True)
    history = await second.history()
    many = candidates(6)
    assert list(history.ledger.values()) == many
    assert [(e.candidate, e.outcome.kind) for e in history.population] == [(c, "measured") for c in many[:3]]


async def test_lost_jobs_are_put_back_and_done_ones_are_not(it: State) -> None:
    queue, _ = await it.begin(4)
    await it.commit(5.0)
    await it.redis.delete(it.keys.jobs)
    assert await it.store.repair(queue, await it.store.history()) == 3
    assert await it.store.repair(queue, await it.store.history()) == 0
    assert await it.queued() == {c.id for c in candidates(4)[1:]}


async def test_a_living_daemon_is_not_replaced(it: State) -> None:
    living = asyncio.create_task(it.store.stay_in_charge(*await it.begin(0)))
    with pytest.raises(SearchExistsError, match="already run by"):
        await it.other().take_charge()
    living.cancel()


async def test_a_server_that_was_flushed_gets_everything_back_and_the_lost_jobs_too(it: State) -> None:
    queue, _ = await it.begin(5)
    many = candidates(5)
    for perplexity in (9.0, 8.0):
        await it.commit(perplexity)
    for result in await queue.results("0-0"):
        await queue.apply(result)
    chosen = KeptSelection(parents=(many[1].id, many[0].id), step="plans")
    await queue.remember_selection(1, chosen)
    before = await it.store.history()
    living = asyncio.create_task(it.store.stay_in_charge(queue, lambda: Memory(before, PROFILE)))
    await it.redis.flushall()
    late = candidates(6)[-1]
    async with asyncio.timeout(10):
        assert await queue.enqueue(late)  # waits until the data is back
    after = await it.store.history()
    assert list(after.ledger) == [*before.ledger, late.id] and list(after.population) == list(before.population)
    assert after.selections == before.selections == {1: chosen}
    assert await it.store.profile() == PROFILE
    assert await it.queued() == {c.id for c in many[2:]} | {late.id}
    living.cancel()


async def test_jobs_that_are_lost_while_the_daemon_runs_are_back_within_a_tick(it: State) -> None:
    living = asyncio.create_task(it.store.stay_in_charge(*await it.begin(3)))
    await it.redis.delete(it.keys.jobs)

    async def back() -> bool:
        return await it.queued() == {c.id for c in candidates(3)}

    await eventually(back, 10)
    living.cancel()


async def test_a_killed_daemon_is_waited_out_and_replaced(it: State) -> None:
    await it.other().take_charge()
    await it.other().take_charge()


@pytest.mark.parametrize("seconds", [None, 3600])
async def test_a_sign_of_life_that_nobody_renews_is_waited_out_whatever_its_expiry(
    it: State, seconds: int | None
) -> None:
    await it.redis.set(it.keys.daemon, "by hand", ex=seconds)
    async with asyncio.timeout(20):
        await it.other().take_charge()


@pytest.mark.parametrize("text", ["abc", "nan", "1e999", "-1", b"\xff"])
async def test_a_damaged_counter_is_left_out_and_counted_as_damage(it: State, text: str | bytes) -> None:
    await it.store.take_charge()
    await it.store.count({"cost": 1.0, "seconds": 2.0})
    await it.redis.hset(it.keys.state, "cost", text)
    history = await it.store.history()
    assert (history.counters, history.damaged) == ({"seconds": 2.0}, 1)
    reader = HistoryReader(it.redis, it.keys)
    assert await reader.read()
    assert reader.history.counters == {"seconds": 2.0}
    await it.store.replace_counters({"seconds": 3.0})
    assert await it.redis.hgetall(it.keys.state) == {"seconds": "3.0"}


@pytest.mark.parametrize("begun", [False, True])
async def test_a_damaged_spec_is_replaced_where_the_candidates_are_of_this_one(it: State, begun: bool) -> None:
    await it.begin(2 if begun else 0)
    if begun:
        await it.redis.hset(it.keys.candidates, candidates(1)[0].id, b"\xff")
    await it.redis.set(it.keys.spec, b"\xff{")
    await it.succeed()
    assert await it.redis.get(it.keys.spec) == SPEC.model_dump_json()


@pytest.mark.parametrize("readable", [True, False])
async def test_a_damaged_spec_is_not_replaced_by_one_that_its_candidates_may_not_be_of(
    it: State, readable: bool
) -> None:
    await it.begin(1)
    if not readable:
        await it.redis.delete(it.keys.candidates)
    await it.redis.set(it.keys.spec, "{")
    other = SPEC.model_copy(update={"rate": 0.5}) if readable else SPEC
    with pytest.raises(SearchExistsError, match="selfpruner:test:spec in Redis is damaged"):
        await it.succeed(other)
    assert await it.redis.get(it.keys.spec) == "{"


async def test_a_replaced_daemon_notices(it: State) -> None:
    queue, memory = await it.begin(0)
    await it.succeed()
    with pytest.raises(TakenOver):
        async with asyncio.timeout(10):
            await it.store.stay_in_charge(queue, memory)


async def test_stepping_down_lets_a_successor_begin_at_once(it: State) -> None:
    await it.store.take_charge()
    await it.store.step_down()
    assert not await it.redis.exists(it.keys.daemon)


async def test_another_spec_under_the_same_name_is_refused_and_the_difference_named(it: State) -> None:
    await it.begin(1)
    other = SPEC.model_copy(update={"rate": 0.5})
    with pytest.raises(SearchExistsError, match=r"rate: 0\.3 there, 0\.5 here"):
        await it.succeed(other)


async def test_a_spec_that_nothing_was_measured_under_may_be_fixed(it: State) -> None:
    await it.other(SPEC.model_copy(update={"model": "no/such-model"})).take_charge()
    await it.succeed()
    assert await it.redis.get(it.keys.spec) == SPEC.model_dump_json()


async def test_a_search_that_was_refused_once_its_model_was_known_gives_its_name_up(it: State) -> None:
    """Its profile is there, and no candidate: a text was too short for its settings, say."""
    other = SPEC.model_copy(update={"rate": 0.5})
    await it.other().take_charge()
    await it.redis.set(it.keys.profile, profile_for(SPEC).model_dump_json())
    fixed = it.other(other)
    await fixed.take_charge(previous_is_dead=True)
    assert await it.redis.get(it.keys.spec) == other.model_dump_json()
    assert await fixed.profile() is None
    keyed = [it.keys.spec, it.keys.state, it.keys.issued, it.keys.epoch]
    asked_again = load_scripts(it.redis)["replace_spec"]
    assert await asked_again(keyed, [SPEC.model_dump_json(), other.model_dump_json()]) == 1, "the answer was lost"


async def test_counters_add_up_over_restarts(it: State) -> None:
    for _ in range(2):
        store = it.other()
        await store.take_charge(previous_is_dead=True)
        seconds = (await store.history()).counters.get("seconds", 0.0) + 1.5
        await store.count({"seconds": seconds, "requests": 0.0})
    assert (await it.store.history()).counters == {"seconds": 3.0, "requests": 0.0}


async def test_what_another_version_wrote_is_refused_and_not_overwritten(it: State) -> None:
    await it.redis.set(it.keys.spec, '{"from":"the future"}')
    with pytest.raises(StoreError, match="another version"):
        await it.succeed()
    assert await it.redis.get(it.keys.spec) == '{"from":"the future"}'


async def test_a_server_that_may_evict_data_is_refused(it: State) -> None:
    await it.redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StoreError, match="noeviction"):
            await check_server(it.redis)
    finally:
        await it.redis.config_set("maxmemory-policy", "noeviction")
