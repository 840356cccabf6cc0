"""The durable state: who is in charge, and what a restart finds."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from daemon.state.history import Memory, RemoteHistory
from daemon.state.store import SearchStore
from protocol.errors import SearchExistsError, StoreError
from protocol.queue.connection import check_server
from protocol.queue.keys import Keys
from protocol.queue.streams import TakenOver, load_scripts
from tests.daemon.state.conftest import Begin, Commit
from tests.protocol.queue.test_streams import queued
from tests.support.samples import PROFILE, SPEC, candidates, profile_for
from tests.support.servers import eventually

pytestmark = pytest.mark.usefixtures("_short_signs_of_life")


async def test_a_restart_finds_the_ledger_and_the_outcomes_in_their_order(
    redis: Redis, keys: Keys, begin: Begin, commit: Commit
) -> None:
    queue, _ = await begin(6)
    for perplexity in (9.0, 8.0, 7.0):
        await commit(perplexity)
    for result in await queue.results("0-0"):
        await queue.apply(result)

    second = SearchStore(redis, keys, SPEC)
    await second.take_charge(previous_is_dead=True)
    history = await second.history()
    many = candidates(6)
    assert list(history.ledger.values()) == many
    assert [o.kind for o in history.outcomes.values()] == ["measured"] * 3
    assert list(history.outcomes) == [c.id for c in many[:3]]


async def test_lost_jobs_are_put_back_and_done_ones_are_not(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin, commit: Commit
) -> None:
    queue, _ = await begin(4)
    await commit(5.0)
    await redis.delete(keys.jobs)
    assert await store.repair(queue, await store.history()) == 3
    assert await store.repair(queue, await store.history()) == 0
    assert await queued(redis, keys) == {c.id for c in candidates(4)[1:]}


async def test_a_living_daemon_is_not_replaced(redis: Redis, keys: Keys, store: SearchStore, begin: Begin) -> None:
    living = asyncio.create_task(store.stay_in_charge(*await begin(0)))
    with pytest.raises(SearchExistsError, match="already run by"):
        await SearchStore(redis, keys, SPEC).take_charge()
    living.cancel()


async def test_a_server_that_was_flushed_gets_everything_back_and_the_lost_jobs_too(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin, commit: Commit
) -> None:
    queue, _ = await begin(5)
    many = candidates(5)
    for perplexity in (9.0, 8.0):
        await commit(perplexity)
    for result in await queue.results("0-0"):
        await queue.apply(result)
    await queue.remember_selection(1, [many[1].id, many[0].id])
    before = await store.history()
    living = asyncio.create_task(store.stay_in_charge(queue, lambda: Memory(before, PROFILE)))
    await redis.flushall()
    late = candidates(6)[-1]
    async with asyncio.timeout(10):
        assert await queue.enqueue(late)  # waits until the data is back
    after = await store.history()
    assert list(after.ledger) == [*before.ledger, late.id] and after.outcomes == before.outcomes
    assert after.selections == before.selections == {1: (many[1].id, many[0].id)}
    assert await store.profile() == PROFILE
    assert await queued(redis, keys) == {c.id for c in many[2:]} | {late.id}
    living.cancel()


async def test_jobs_that_are_lost_while_the_daemon_runs_are_back_within_a_tick(
    redis: Redis, keys: Keys, store: SearchStore, begin: Begin
) -> None:
    living = asyncio.create_task(store.stay_in_charge(*await begin(3)))
    await redis.delete(keys.jobs)

    async def back() -> bool:
        return await queued(redis, keys) == {c.id for c in candidates(3)}

    await eventually(back, 10)
    living.cancel()


async def test_a_killed_daemon_is_waited_out_and_replaced(redis: Redis, keys: Keys) -> None:
    await SearchStore(redis, keys, SPEC).take_charge()
    await SearchStore(redis, keys, SPEC).take_charge()


@pytest.mark.parametrize("seconds", [None, 3600])
async def test_a_sign_of_life_that_nobody_renews_is_waited_out_whatever_its_expiry(
    redis: Redis, keys: Keys, seconds: int | None
) -> None:
    await redis.set(keys.daemon, "by hand", ex=seconds)
    async with asyncio.timeout(20):
        await SearchStore(redis, keys, SPEC).take_charge()


@pytest.mark.parametrize("text", ["abc", "nan", "1e999", "-1", b"\xff"])
async def test_a_damaged_counter_is_left_out_and_counted_as_damage(
    redis: Redis, keys: Keys, store: SearchStore, text: str | bytes
) -> None:
    await store.take_charge()
    await store.count({"cost": 1.0, "seconds": 2.0})
    client: Any = redis
    await client.hset(keys.state, "cost", text)
    history = await store.history()
    assert (history.counters, history.damaged) == ({"seconds": 2.0}, 1)
    remote = RemoteHistory(redis, keys)
    assert await remote.read()
    assert remote.counters == {"seconds": 2.0}
    await store.replace_counters({"seconds": 3.0})
    assert await client.hgetall(keys.state) == {"seconds": "3.0"}


@pytest.mark.parametrize("begun", [False, True])
async def test_a_damaged_spec_is_replaced_where_the_candidates_are_of_this_one(
    redis: Redis, keys: Keys, begin: Begin, begun: bool
) -> None:
    await begin(2 if begun else 0)
    client: Any = redis
    if begun:
        await client.hset(keys.candidates, candidates(1)[0].id, b"\xff")
    await client.set(keys.spec, b"\xff{")
    await SearchStore(redis, keys, SPEC).take_charge(previous_is_dead=True)
    assert await client.get(keys.spec) == SPEC.model_dump_json()


@pytest.mark.parametrize("readable", [True, False])
async def test_a_damaged_spec_is_not_replaced_by_one_that_its_candidates_may_not_be_of(
    redis: Redis, keys: Keys, begin: Begin, readable: bool
) -> None:
    await begin(1)
    client: Any = redis
    if not readable:
        await client.delete(keys.candidates)
    await client.set(keys.spec, "{")
    other = SPEC.model_copy(update={"rate": 0.5}) if readable else SPEC
    with pytest.raises(SearchExistsError, match="selfpruner:test:spec in Redis is damaged"):
        await SearchStore(redis, keys, other).take_charge(previous_is_dead=True)
    assert await client.get(keys.spec) == "{"


async def test_a_replaced_daemon_notices(redis: Redis, keys: Keys, store: SearchStore, begin: Begin) -> None:
    queue, memory = await begin(0)
    await SearchStore(redis, keys, SPEC).take_charge(previous_is_dead=True)
    with pytest.raises(TakenOver):
        async with asyncio.timeout(10):
            await store.stay_in_charge(queue, memory)


async def test_stepping_down_lets_a_successor_begin_at_once(redis: Redis, keys: Keys, store: SearchStore) -> None:
    await store.take_charge()
    await store.step_down()
    assert not await redis.exists(keys.daemon)


async def test_another_spec_under_the_same_name_is_refused_and_the_difference_named(
    redis: Redis, keys: Keys, begin: Begin
) -> None:
    await begin(1)
    other = SPEC.model_copy(update={"rate": 0.5})
    with pytest.raises(SearchExistsError, match=r"rate: 0\.3 there, 0\.5 here"):
        await SearchStore(redis, keys, other).take_charge(previous_is_dead=True)


async def test_a_spec_that_nothing_was_measured_under_may_be_fixed(redis: Redis, keys: Keys) -> None:
    await SearchStore(redis, keys, SPEC.model_copy(update={"model": "no/such-model"})).take_charge()
    await SearchStore(redis, keys, SPEC).take_charge(previous_is_dead=True)
    client: Any = redis
    assert await client.get(keys.spec) == SPEC.model_dump_json()


async def test_a_search_that_was_refused_once_its_model_was_known_gives_its_name_up(redis: Redis, keys: Keys) -> None:
    """Its profile is there, and no candidate: a text was too short for its settings, say."""
    client: Any = redis
    other = SPEC.model_copy(update={"rate": 0.5})
    await SearchStore(redis, keys, SPEC).take_charge()
    await client.set(keys.profile, profile_for(SPEC).model_dump_json())
    fixed = SearchStore(redis, keys, other)
    await fixed.take_charge(previous_is_dead=True)
    assert await client.get(keys.spec) == other.model_dump_json()
    assert await fixed.profile() is None
    keyed = [keys.spec, keys.state, keys.issued, keys.epoch]
    asked_again = load_scripts(client)["replace_spec"]
    assert await asked_again(keyed, [SPEC.model_dump_json(), other.model_dump_json()]) == 1, "the answer was lost"


async def test_counters_add_up_over_restarts(redis: Redis, keys: Keys) -> None:
    for _ in range(2):
        store = SearchStore(redis, keys, SPEC)
        await store.take_charge(previous_is_dead=True)
        await store.count({"seconds": (await store.history()).counters.get("seconds", 0.0) + 1.5, "requests": 0.0})
    assert (await store.history()).counters == {"seconds": 3.0, "requests": 0.0}


async def test_what_another_version_wrote_is_refused_and_not_overwritten(redis: Redis, keys: Keys) -> None:
    client: Any = redis
    await client.set(keys.spec, '{"from":"the future"}')
    with pytest.raises(StoreError, match="another version"):
        await SearchStore(redis, keys, SPEC).take_charge(previous_is_dead=True)
    assert await client.get(keys.spec) == '{"from":"the future"}'


async def test_a_server_that_may_evict_data_is_refused(redis: Redis) -> None:
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(StoreError, match="noeviction"):
            await check_server(redis)
    finally:
        await redis.config_set("maxmemory-policy", "noeviction")
