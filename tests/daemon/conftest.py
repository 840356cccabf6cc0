"""Searches with a real server, for tests of a search and of what is said of it."""

from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis

from daemon.search.search import Search
from protocol.queue.keys import Keys
from tests.support.conducted import Conduct, Conducted


@pytest.fixture
def conduct(redis: Redis, keys: Keys, tmp_path: Path) -> Conduct:
    """Make a search with options of `Conducted`."""
    return partial(Conducted, redis, keys, tmp_path)


@pytest.fixture
async def search(conduct: Conduct) -> Search:
    """A search that has ended."""
    return await conduct().searched()
