"""Fixtures shared by all tests."""

import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import structlog
from redis.asyncio import Redis

from protocol.queue.connection import connect
from protocol.queue.keys import Keys
from tests.support.cli import Cli
from tests.support.servers import Server, server_binary


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the second server if a test needs one of them only."""
    items[:] = [item for item in items if not (item.get_closest_marker("one_server") and _is_on_redis(item))]


def _is_on_redis(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and "running_server" in item.fixturenames and "[redis" in item.name


@pytest.fixture(scope="session", autouse=True)
def _computing_as_the_commands_do() -> Iterator[None]:
    """Without this, a real model takes ten times as long on CPUs without bfloat16 instructions."""
    if find_spec("torch") is None:
        yield
        return
    from gpu_worker.measuring.half_precision import products_in_float32

    with products_in_float32():
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_cache_for_all_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache is left alone, and no model is unpacked or measured twice; see `own_cache` for an empty one."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
    """A real, running server without data, whatever the previous test did to it."""
    if running_server.process.poll() is not None:
        running_server.start()
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


@pytest.fixture
def restored_logs() -> Iterator[None]:
    """Restore the logging configuration after a test."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(before):
        handler.close()
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], restored_logs: None) -> Cli:
    return Cli(capsys)


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and three texts, which tests leave unchanged."""
    from tests.support.tiny_models import save_tiny_folder
    from tests.support.tiny_specs import write_text

    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    for seed, name in enumerate(("text.txt", "data.txt", "calibration.txt")):
        write_text(folder / name, seed=seed)
    return folder


@pytest.fixture(autouse=True)
def _no_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SELFPRUNER_"):
            monkeypatch.delenv(name)
