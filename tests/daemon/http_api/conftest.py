"""The HTTP API of a search, in this process."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from daemon.monitor.observer import Observer
from protocol.queue.keys import Keys
from tests.support.http_client import Asked, nothing_yet, served
from tests.support.observed import Observed, observed


@pytest.fixture
async def observer(tmp_path: Path) -> AsyncIterator[Observer]:
    """The observer of a search that waits for its server."""
    observer = nothing_yet(tmp_path)
    yield observer
    await observer.redis.aclose()


@pytest.fixture
async def ask(observer: Observer) -> AsyncIterator[Asked]:
    """A client of that search's API."""
    async with served(observer) as asked:
        yield asked


@pytest.fixture
async def it(redis: Redis, keys: Keys, tmp_path: Path) -> AsyncIterator[Observed]:
    """A search that has not begun, with its observer and its API."""
    async with observed(redis, keys, tmp_path) as it:
        yield it
