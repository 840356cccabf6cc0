"""The model profile: published for one spec, and ignored for every other."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from daemon.state.store import SearchStore
from protocol.errors import StoreError
from protocol.queue.keys import Keys
from protocol.queue.profile_board import ProfileBoard
from tests.support.samples import PROFILE, SPEC, profile_for

OTHER = SPEC.model_copy(update={"model": "another"})


@pytest.fixture
async def board(redis: Redis, keys: Keys) -> ProfileBoard:
    await redis.set(keys.spec, SPEC.model_dump_json())
    return ProfileBoard(redis, keys)


async def test_the_first_profile_of_a_spec_counts(board: ProfileBoard) -> None:
    second = PROFILE.model_copy(update={"device": "cuda"})
    assert await board.read(SPEC.fingerprint) is None
    assert [await board.publish(PROFILE), await board.publish(second)] == [PROFILE, PROFILE]
    assert await board.read(SPEC.fingerprint) == PROFILE


async def test_a_worker_of_a_replaced_spec_publishes_nothing(board: ProfileBoard, redis: Redis, keys: Keys) -> None:
    assert await board.publish(profile_for(OTHER)) is None
    assert not await redis.exists(keys.profile)
    await redis.delete(keys.spec)
    assert await board.publish(PROFILE) is None


async def test_the_profile_of_another_spec_is_ignored_and_replaced(
    board: ProfileBoard, redis: Redis, keys: Keys
) -> None:
    await redis.set(keys.profile, profile_for(OTHER).model_dump_json())
    assert await board.read(SPEC.fingerprint) is None
    assert await SearchStore(redis, keys, SPEC).profile() is None
    assert await board.publish(PROFILE) == PROFILE
    assert await SearchStore(redis, keys, SPEC).profile() == PROFILE


async def test_a_spec_that_changes_while_a_profile_is_published_is_noticed(
    board: ProfileBoard, redis: Redis, keys: Keys
) -> None:
    publish = board._publish

    async def after_a_change(*arguments: Any) -> Any:
        await redis.set(keys.spec, OTHER.model_dump_json())
        return await publish(*arguments)

    board._publish = after_a_change
    async with asyncio.timeout(20):
        assert await board.publish(PROFILE) is None
    assert not await redis.exists(keys.profile)


async def test_a_profile_of_another_version_is_an_error_of_one_sentence(
    board: ProfileBoard, redis: Redis, keys: Keys
) -> None:
    await redis.set(keys.profile, '{"from":"the future"}')
    with pytest.raises(StoreError, match="another version"):
        await board.read(SPEC.fingerprint)
