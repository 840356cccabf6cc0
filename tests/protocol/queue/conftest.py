"""Fixtures of the tests of the streams."""

import pytest
from redis.asyncio import Redis

from protocol.queue import jobs as jobs_module
from protocol.queue.keys import Keys
from tests.support.streams import Streams


@pytest.fixture
async def streams(redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> Streams:
    monkeypatch.setattr(jobs_module, "BLOCK_MILLISECONDS", 100)  # between two looks at the jobs of others
    await redis.set(keys.epoch, 1)
    return Streams(redis, keys)
