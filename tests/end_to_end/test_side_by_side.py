"""Several searches under one Redis, and workers that join late and leave early."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from protocol.queue.control import Control
from protocol.queue.keys import Keys
from tests.support.root import ROOT
from tests.support.schema_answers import answer
from tests.support.scripted_llm import ScriptedLlm
from tests.support.servers import Server, eventually
from tests.support.tiny_models import save_tiny_folder
from tests.support.tiny_specs import tiny_search, write_text

pytestmark = pytest.mark.one_server
CANDIDATES = 6 + 4 * (3 + 2)


@pytest.fixture
async def llm() -> AsyncIterator[ScriptedLlm]:
    """Slow enough for the third worker to find something to do."""
    async with ScriptedLlm(partial(answer, after=0.05)) as llm:
        yield llm


class Command:
    """`selfpruner …` as a process, with the events that it logged."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def events(self) -> list[dict[str, Any]]:
        whole = self._log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def named(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.events if line["event"] == event]

    async def said(self, event: str) -> bool:
        assert self.process.returncode in (None, 0), self._log.read_text()
        return bool(self.named(event))

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 180)


@asynccontextmanager
async def selfpruner(server: Server, folder: Path, name: str, *arguments: str) -> AsyncIterator[Command]:
    """Start it in `folder`; killed at the end if it is still there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SELFPRUNER_REDIS__URL": server.url}
    log = folder / f"{name}.out"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "daemon", *arguments, cwd=folder, env=environment, stdout=out, stderr=out
        )
    try:
        yield Command(process, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def write_settings(folder: Path, name: str, llm: ScriptedLlm, *, layers: int, rate: float) -> Path:
    """Settings of a search with a model of its own."""
    model = save_tiny_folder(folder / f"model-{name}", hidden_size=48, layers=layers)
    text = write_text(folder / f"{name}.txt", seed=layers)
    settings = tiny_search(name, model, Path(text), [llm.settings], rate=rate, rounds=4)
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings | {"http": {"enabled": False}}))
    return path


async def test_two_searches_side_by_side_and_a_worker_that_comes_late_and_leaves_early(
    server: Server, redis: Redis, llm: ScriptedLlm, tmp_path: Path
) -> None:
    first = write_settings(tmp_path, "first", llm, layers=3, rate=0.3)
    second = write_settings(tmp_path, "second", llm, layers=4, rate=0.4)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        one = await enter(selfpruner(server, tmp_path, "daemon-1", "daemon", str(first)))
        two = await enter(selfpruner(server, tmp_path, "daemon-2", "daemon", str(second)))
        workers = [
            await enter(selfpruner(server, tmp_path, f"worker-{name}", "worker", "--search", name))
            for name in ("first", "second")
        ]
        await eventually(lambda: one.said("candidate_measured"), 120)
        control = Control(redis, Keys("first"))
        await control.write("pause")  # or the tiny search would be over before the third worker has its model
        late = await enter(selfpruner(server, tmp_path, "late", "worker", "--search", "first"))
        await eventually(lambda: late.said("model_ready"), 120)
        await control.write("run")
        await eventually(lambda: late.said("outcome_committed"), 120)
        late.process.send_signal(signal.SIGTERM)
        assert await late.ended() == 0
        assert [await one.ended(), await two.ended()] == [0, 0]
        for worker in workers:
            worker.process.send_signal(signal.SIGTERM)
        assert [await worker.ended() for worker in workers] == [0, 0]

    ids = [check_finished(tmp_path / "runs" / name) for name in ("first", "second")]
    assert not ids[0] & ids[1]
    for worker, search in zip((*workers, late), ("first", "second", "first"), strict=True):
        assert {line["search"] for line in worker.events} == {search}
    committed = [line["candidate"] for w in (workers[0], late) for line in w.named("outcome_committed")]
    assert sorted(committed) == sorted(ids[0])  # by one of the two, once


def check_finished(folder: Path) -> set[str]:
    """Every candidate was proposed and measured once; their ids."""
    records = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert len([r for r in records if r["agent"] != "baseline"]) == CANDIDATES
    assert all(record["outcome"]["kind"] == "measured" for record in records)
    ids = {record["id"] for record in records}
    assert len(ids) == len(records)
    return ids
