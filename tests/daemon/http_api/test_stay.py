"""`daemon --stay`: a process that its service manager never has to start again for nothing."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from daemon.http_api.stay import _answer
from daemon.http_api.token import Access
from daemon.settings.sources import load
from tests.support.http_client import TOKEN
from tests.support.root import ROOT
from tests.support.samples import put_status, write_daemon_settings
from tests.support.servers import Server, eventually

pytestmark = pytest.mark.one_server


@pytest.fixture
def config(tmp_path: Path) -> Path:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return write_daemon_settings(tmp_path, http={"port": port})


async def waited(folder: Path, *command: str, **environment: str) -> str:
    """The log of a command that says what is wrong, waits, and is told to end."""
    log = folder / "log"
    with log.open("wb") as both:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "daemon", *command, "--stay"),
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=both,
            stderr=both,
        )

    await eventually(lambda: "invalid_input" in log.read_text(), 60)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 20) == 2
    text = log.read_text()
    assert text.count("invalid_input") == 1 and "Traceback" not in text and "wrong-pw" not in text
    return text


@pytest.mark.parametrize("wrong", ["search.popluation=3", "redis.url=unix://joe:wrong-pw@{socket}"])
async def test_invalid_input_is_logged_once_and_waited_for(
    config: Path, tmp_path: Path, running_server: Server, wrong: str
) -> None:
    log = await waited(tmp_path, "daemon", str(config), "--set", wrong.format(socket=running_server.socket))
    assert '"ending"' in log  # of the signal that it waited for


@pytest.mark.parametrize("file", ["no-such-file.yaml", "search.yaml"])
async def test_a_worker_that_cannot_work_says_why_once_and_waits(
    config: Path, tmp_path: Path, running_server: Server, file: str
) -> None:
    url = f"unix://joe:wrong-pw@{running_server.socket}"
    await waited(tmp_path, "worker", "--config", str(tmp_path / file), SELFPRUNER_REDIS__URL=url)


async def test_a_search_that_has_ended_still_says_how_far_it_came(config: Path) -> None:
    settings = load(config)
    task = asyncio.create_task(_answer(settings, Access(SecretStr(TOKEN))))
    url = f"http://127.0.0.1:{settings.http.port}"

    async def ask(path: str, token: str = TOKEN, method: str = "GET") -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        async with session.request(method, url + path, headers=headers) as response:
            return response.status, await response.json()

    async def listening() -> bool:
        try:
            return await ask("/livez", "") == (200, {"alive": True})
        except aiohttp.ClientConnectionError:
            return False

    async with aiohttp.ClientSession() as session:
        await eventually(listening)
        assert (await ask("/api/status"))[0] == 503
        put_status(settings.folder)
        assert (await ask("/api/status", "another-token"))[0] == 401
        status, body = await ask("/api/status")
        assert (status, body["measured"], body["daemon"]) == (200, 7, None)
        for method, path in (("GET", "/api/events"), ("POST", "/api/control"), ("GET", "/metrics")):
            status, body = await ask(path, method=method)
            assert status == 503 and "the search has ended" in body["error"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
