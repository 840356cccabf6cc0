"""The model card: published for one spec, and as good as none for every other."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from daemon.state.store import SearchStore
from protocol.errors import StoreError
from protocol.queue.card_board import CardBoard
from protocol.queue.keys import Keys
from tests.support.samples import CARD, SPEC, card_for

OTHER = SPEC.model_copy(update={"model": "another"})


@pytest.fixture
async def board(redis: Redis, keys: Keys) -> CardBoard:
    await redis.set(keys.spec, SPEC.model_dump_json())
    return CardBoard(redis, keys)


async def test_the_first_card_of_a_spec_counts(board: CardBoard) -> None:
    second = CARD.model_copy(update={"device": "cuda"})
    assert await board.read(SPEC.fingerprint) is None
    assert [await board.publish(CARD), await board.publish(second)] == [CARD, CARD]
    assert await board.read(SPEC.fingerprint) == CARD


async def test_a_worker_of_a_spec_that_the_search_has_no_more_publishes_nothing(
    board: CardBoard, redis: Redis, keys: Keys
) -> None:
    assert await board.publish(card_for(OTHER)) is None
    assert not await redis.exists(keys.card)
    await redis.delete(keys.spec)
    assert await board.publish(CARD) is None


async def test_the_card_of_another_spec_is_none_and_gives_way(board: CardBoard, redis: Redis, keys: Keys) -> None:
    await redis.set(keys.card, card_for(OTHER).model_dump_json())
    assert await board.read(SPEC.fingerprint) is None
    assert await SearchStore(redis, keys, SPEC).card() is None
    assert await board.publish(CARD) == CARD
    assert await SearchStore(redis, keys, SPEC).card() == CARD


async def test_a_spec_that_changes_between_the_look_and_the_publishing_is_noticed(
    board: CardBoard, redis: Redis, keys: Keys
) -> None:
    publish, client = board._publish, redis

    async def after_a_change(*arguments: Any) -> Any:
        await client.set(keys.spec, OTHER.model_dump_json())
        return await publish(*arguments)

    board._publish = after_a_change
    async with asyncio.timeout(20):
        assert await board.publish(CARD) is None
    assert not await redis.exists(keys.card)


async def test_a_card_of_another_version_is_an_error_of_one_sentence(
    board: CardBoard, redis: Redis, keys: Keys
) -> None:
    await redis.set(keys.card, '{"from":"the future"}')
    with pytest.raises(StoreError, match="another version"):
        await board.read(SPEC.fingerprint)
