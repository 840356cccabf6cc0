"""Real workers: processes that prune and measure a tiny model, and are killed at it.

Tests that need no real evaluation use the fake one of the fault tests.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis.asyncio import Redis

from gpu_worker.progress import LogThrottle
from gpu_worker.worker.options import WorkerOptions
from gpu_worker.worker.worker import Worker
from protocol.plans.candidate import Candidate, Measured, Provenance, Result, candidate_id
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec
from protocol.queue.control import Control
from protocol.queue.keys import Keys
from protocol.queue.streams import CandidateQueue
from protocol.queue.worker_status import read_workers
from tests.faults.kit import Kit, candidates, fault_kit
from tests.support.clock import Clock
from tests.support.samples import PROFILE, SPEC
from tests.support.servers import Server, eventually

pytestmark = pytest.mark.one_server
LEASE = "1.5"


@asynccontextmanager
async def worker_process(server: Server, *options: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m gpu_worker` in a session of its own; whatever is left of it is killed at the end."""
    command = [sys.executable, "-m", "gpu_worker", "--search", "test", "--lease-seconds", LEASE, *options]
    environment = {**os.environ, "SELFPRUNER_REDIS__URL": server.url}
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, start_new_session=True, stderr=asyncio.subprocess.PIPE
    )
    drain = asyncio.create_task(_read_all(process))
    try:
        yield process
    finally:
        for child in children_of(process):
            child.kill()
        if process.returncode is None:
            process.kill()
        await process.wait()
        process.log = (await drain).decode()  # type: ignore[attr-defined]


async def _read_all(process: asyncio.subprocess.Process) -> bytes:
    assert process.stderr is not None
    return await process.stderr.read()


def children_of(process: asyncio.subprocess.Process) -> list[psutil.Process]:
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


class Daemon:
    """The daemon's side of the streams, by hand."""

    def __init__(self, redis: Redis, keys: Keys, spec: SearchSpec) -> None:
        self.redis: Any = redis
        self.keys = keys
        self.spec = spec
        self.queue = CandidateQueue(redis, keys, epoch=1, fingerprint=spec.fingerprint)
        self.results: list[Result] = []

    async def begin(self) -> ModelProfile:
        await self.redis.set(self.keys.epoch, 1)
        await self.redis.set(self.keys.spec, self.spec.model_dump_json())
        await eventually(lambda: self.redis.exists(self.keys.profile), 120)
        return ModelProfile.model_validate_json(await self.redis.get(self.keys.profile))

    async def issue(self, profile: ModelProfile, count: int) -> list[Candidate]:
        issued = []
        for i in range(count):
            rates = self.spec.feasible([0.05 + 0.02 * i, *[0.3] * (len(profile.shape.layers) - 1)], profile.shape)
            plan = self.spec.plan(rates, profile.shape)
            made_by = Provenance(agent="initializer", source="llm", round=0)
            id_ = candidate_id(plan, self.spec.fingerprint)
            candidate = Candidate(id=id_, rates=rates, plan=plan, provenance=made_by)
            if await self.queue.enqueue(candidate):
                issued.append(candidate)
        return issued

    async def collected(self, count: int) -> bool:
        cursor = self.results[-1].cursor if self.results else "0-0"
        self.results += await self.queue.results(cursor)
        return len(self.results) >= count


@pytest.fixture
async def daemon(redis: Redis, keys: Keys, spec: SearchSpec) -> Daemon:
    return Daemon(redis, keys, spec)


async def test_a_worker_publishes_the_profile_and_measures_every_candidate_once(server: Server, daemon: Daemon) -> None:
    """Although its evaluation process is killed in between, which it replaces."""
    async with worker_process(server) as process:
        profile = await daemon.begin()
        issued = await daemon.issue(profile, 8)
        await eventually(lambda: daemon.collected(2), 60)
        (child,) = children_of(process)
        child.kill()
        await eventually(lambda: daemon.collected(len(issued)), 90)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
        assert not children_of(process)
    assert profile.dense.perplexity > 1 and len(profile.sensitivity) == len(profile.shape.layers)
    assert sorted(r.id for r in daemon.results) == sorted(c.id for c in issued)
    assert all(isinstance(r.outcome, Measured) for r in daemon.results)
    assert await daemon.redis.xlen(daemon.keys.jobs) == 0


async def test_when_a_worker_is_killed_another_takes_its_job_over_and_its_child_dies_with_it(
    server: Server, daemon: Daemon
) -> None:
    async with worker_process(server) as first:
        profile = await daemon.begin()
        issued = await daemon.issue(profile, 8)
        await eventually(lambda: daemon.collected(1), 60)
        orphans = children_of(first)
        first.kill()
        await first.wait()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, orphans, timeout=20)
        assert orphans and len(gone) == len(orphans) and not alive
    async with worker_process(server):
        await eventually(lambda: daemon.collected(len(issued)), 90)
    assert sorted(r.id for r in daemon.results) == sorted(c.id for c in issued)


async def test_what_the_user_must_mend_ends_the_worker_with_one_sentence_and_code_2(
    server: Server, daemon: Daemon, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    fitness = daemon.spec.fitness.model_copy(update={"source": str(tmp_path / "short.txt")})
    broken = daemon.spec.model_copy(update={"fitness": fitness})
    await daemon.redis.set(daemon.keys.spec, broken.model_dump_json())
    async with worker_process(server, "--quiet") as process:
        assert await asyncio.wait_for(process.wait(), 60) == 2
    log: str = process.log  # type: ignore[attr-defined]
    (sentence,) = log.strip().splitlines()
    assert sentence.startswith("selfpruner: ") and "short.txt" in sentence


@pytest.fixture
async def kit(server: Server, tmp_path: Path) -> AsyncIterator[Kit]:
    async with fault_kit(server, tmp_path) as kit:
        yield kit


async def is_prepared(kit: Kit) -> None:
    await eventually(lambda: kit.redis.exists(kit.keys.profile))


async def test_a_paused_worker_claims_nothing_until_it_may(kit: Kit) -> None:
    daemon = await kit.daemon()
    await kit.worker()
    await is_prepared(kit)
    await Control(kit.redis, kit.keys).write("pause")
    await asyncio.sleep(1.2)  # until the running claim has ended
    await daemon.issue(candidates(3))
    await asyncio.sleep(1)
    assert not kit.evaluations
    await Control(kit.redis, kit.keys).write("run")
    await daemon.settled()


async def test_a_worker_that_finds_a_damaged_spec_waits_for_its_daemon(kit: Kit) -> None:
    await kit.redis.set(kit.keys.spec, b"\xff not UTF-8")
    worker = await kit.worker()
    await eventually(lambda: worker.events("waiting_for_search"))
    await kit.redis.set(kit.keys.spec, SPEC.model_dump_json())
    await is_prepared(kit)
    assert worker.process.returncode is None


async def test_a_worker_with_other_texts_than_the_first_is_refused(kit: Kit) -> None:
    await kit.redis.set(kit.keys.spec, SPEC.model_dump_json())
    await kit.redis.set(kit.keys.profile, PROFILE.model_copy(update={"texts": "f" * 16}).model_dump_json())
    worker = await kit.worker()
    assert await worker.ended() == 2
    assert "texts differ from those" in worker.events("ended")[0]["error"]


async def test_a_worker_whose_server_is_away_still_ends_when_told_to(kit: Kit) -> None:
    await kit.redis.set(kit.keys.spec, SPEC.model_dump_json())
    worker = await kit.worker()
    await is_prepared(kit)
    kit.server.kill()
    await eventually(lambda: worker.events("redis_unreachable"))
    worker.send(signal.SIGTERM)
    assert await worker.ended() == 0 and not worker.children()
    kit.server.start()


async def test_a_worker_may_leave_when_the_search_has_ended(server: Server, daemon: Daemon, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    async with worker_process(server, "--exit-when-done", "--alive-file", str(alive)) as process:
        profile = await daemon.begin()
        issued = await daemon.issue(profile, 2)
        await eventually(lambda: daemon.collected(len(issued)), 60)
        assert alive.exists() and process.returncode is None
        await daemon.redis.set(daemon.keys.condition, "not what a daemon writes")
        assert len(daemon.results) == len(issued)
        await asyncio.sleep(1.5)
        assert process.returncode is None
        await daemon.redis.set(daemon.keys.condition, '{"finished": true}')
        assert await asyncio.wait_for(process.wait(), 30) == 0
        assert not children_of(process)


async def test_a_worker_may_leave_when_it_has_had_no_work_for_a_while(server: Server, daemon: Daemon) -> None:
    async with worker_process(server, "--idle-seconds", "3") as process:
        profile = await daemon.begin()
        issued = await daemon.issue(profile, 2)
        await eventually(lambda: daemon.collected(len(issued)), 60)
        assert process.returncode is None
        assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_a_worker_shows_life_while_its_server_is_away(server: Server, tmp_path: Path) -> None:
    """Otherwise a probe would kill the workers of an outage."""
    alive = tmp_path / "alive"
    async with worker_process(server, "--alive-file", str(alive)):
        await eventually(alive.exists, 30)
        server.kill()
        alive.unlink()
        await eventually(alive.exists, 15)


async def test_a_file_that_cannot_be_touched_is_said_at_once(server: Server, tmp_path: Path) -> None:
    async with worker_process(server, "--quiet", "--alive-file", str(tmp_path / "no" / "folder")) as process:
        assert await asyncio.wait_for(process.wait(), 30) == 2
    assert "--alive-file" in process.log  # type: ignore[attr-defined]


async def test_a_worker_does_not_leave_for_the_end_of_an_earlier_run_of_its_search(
    server: Server, daemon: Daemon
) -> None:
    await daemon.redis.set(daemon.keys.condition, '{"finished": true}')
    async with worker_process(server, "--exit-when-done") as process:
        profile = await daemon.begin()
        issued = await daemon.issue(profile, 2)
        await eventually(lambda: daemon.collected(len(issued)), 60)
        assert process.returncode is None
        await daemon.redis.set(daemon.keys.condition, '{"finished": false}')
        await asyncio.sleep(2)
        await daemon.redis.set(daemon.keys.condition, '{"finished": true}')
        assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_a_worker_publishes_how_long_its_stage_still_takes(redis: Redis, server: Server, keys: Keys) -> None:
    clock = Clock()
    worker = Worker(redis, WorkerOptions(server.url, "test"))
    worker._logged = LogThrottle(clock)
    for done, left in ((0, None), (15, 45), (60, 0)):
        clock.now += done
        worker._show_progress("scoring", done, 60)
        await asyncio.gather(*worker._beats)
        (status,) = (await read_workers(redis, keys)).workers
        assert (status.stage, status.done, status.seconds_left) == ("scoring", done, left)
    worker._show_progress("measuring sensitivity", 0, 60)
    await asyncio.gather(*worker._beats)
    assert (await read_workers(redis, keys)).workers[0].seconds_left is None
