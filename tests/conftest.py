"""Fixtures shared by all tests."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from protocol.connection import connect
from protocol.keys import Keys
from tests.servers import Server, server_binary


@pytest.fixture(scope="session", params=["valkey", "redis"])
def running_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    binary = server_binary(request.param)
    if binary is None:
        pytest.skip("no redis-server on this machine (Debian: redis-server)")
    folder = Path(tempfile.mkdtemp(prefix="sp-"))  # short, for the path of the socket
    server = Server(binary, folder)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder)


@pytest.fixture
def server(running_server: Server) -> Server:
    """A real server without data."""
    running_server.flush()
    return running_server


@pytest.fixture
async def redis(server: Server) -> AsyncIterator[Redis]:
    client = connect(server.url)
    yield client
    await client.aclose()


@pytest.fixture
def keys() -> Keys:
    return Keys("test")


@pytest.fixture(autouse=True)
def _no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("SELFPRUNER_"):
            monkeypatch.delenv(name)
