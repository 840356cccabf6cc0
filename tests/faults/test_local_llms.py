"""Faults of a run's local LLM: it dies, freezes, or its port is taken, and the run continues."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from structlog.testing import capture_logs

from daemon.local.services import local_llm
from daemon.settings.llm import EndpointSettings
from daemon.settings.settings import Settings
from tests.daemon.local.test_llm_server import say_hi
from tests.faults.marks import slow_fault
from tests.support.real_model import need_smollm2
from tests.support.servers import eventually

pytest.importorskip("xllamacpp")
need_smollm2()

Log = list[MutableMapping[str, Any]]


class Served:
    """The local LLM of a run, and what the run's log says of it."""

    def __init__(self, endpoint: EndpointSettings, log: Log) -> None:
        assert endpoint.api_key is not None
        self.log = log
        self._endpoint, self._key = endpoint, endpoint.api_key.get_secret_value()
        self.port = urlsplit(endpoint.base_url).port or 0

    async def answers(self) -> bool:
        return await self.say_hi() == 200

    async def say_hi(self) -> int:
        return await say_hi(self._endpoint, self._key)

    @property
    def process(self) -> psutil.Process:
        (server,) = [each for each in psutil.Process().children() if str(self.port) in each.cmdline()]
        return server

    @property
    def events(self) -> list[str]:
        return [event["event"] for event in self.log]


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Served]:
    given = {"run": {"folder": str(folder)}, "target": {"model": "smollm2", "rate": 0.3}}
    settings = Settings.model_validate(given)
    settings.folder.mkdir()
    with capture_logs() as log:
        async with local_llm(settings) as llm:
            served = Served(llm.endpoint, log)
            await eventually(served.answers, 60)
            yield served


@slow_fault("65", "the local LLM dies while it is asked", "SIGKILL, 4 questions open", "one line, started again")
async def test_a_local_llm_killed_while_answering_is_restarted(tmp_path: Path) -> None:
    async with served(tmp_path) as llm:
        asking = [asyncio.create_task(llm.say_hi()) for _ in range(4)]
        await asyncio.sleep(0)
        llm.process.kill()
        await asyncio.gather(*asking)
        await eventually(llm.answers, 60)
        assert llm.events == ["child_restarted"]


@slow_fault("66", "the port of the local LLM is taken", "SIGKILL, another one listens", "starts when it is free")
async def test_a_local_llm_whose_port_is_taken_starts_when_it_is_free(tmp_path: Path) -> None:
    async with served(tmp_path) as llm:
        llm.process.kill()
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

            async def is_taken() -> bool:
                with contextlib.suppress(OSError):  # the killed server is not gone yet
                    taken.bind(("127.0.0.1", llm.port))
                return bool(taken.getsockname()[1])

            await eventually(is_taken)
            taken.listen()
            await eventually(lambda: len(llm.events) >= 2, 60)
        await eventually(llm.answers, 90)
        assert set(llm.events) == {"child_restarted"}


@slow_fault("67", "the local LLM stands still", "SIGSTOP, SIGCONT; ended while stopped", "answers; none is left")
async def test_a_frozen_local_llm_is_ended_too(tmp_path: Path) -> None:
    async with served(tmp_path) as llm:
        server = llm.process
        server.send_signal(signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm.say_hi(), 1)
        server.send_signal(signal.SIGCONT)
        await eventually(llm.answers, 60)
        server.send_signal(signal.SIGSTOP)
    assert not server.is_running()
    assert llm.events == ["child_killed"]
