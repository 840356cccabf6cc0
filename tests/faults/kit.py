"""The kit of the fault tests: a server, real workers with a fake evaluator, and parts of the daemon.

`Kit.check` holds the invariants after every test: I1 every issued candidate has come to exactly one end, I2 the
outcomes applied are the population, I3 nothing was evaluated more often than it was disturbed, I4 nothing pending has
lost its body, I5 no key is left half restored, I6 no secret is in a log, I7 each log line is strict JSON, I8 no
process and no connection is left.
"""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from redis.asyncio import Redis

from agents.population.keeper import PopulationKeeper
from agents.population.population import Evaluation, Population
from daemon.state.history import History, Memory
from daemon.state.store import SearchStore
from protocol.plans.candidate import Candidate, Outcome
from protocol.plans.plan import count_parameters
from protocol.plans.profile import ModelProfile
from protocol.queue.connection import connect
from protocol.queue.keys import GROUP, Keys
from tests.support.root import ROOT
from tests.support.samples import PROFILE, SHAPE, SPEC, candidate, candidates
from tests.support.servers import Server, eventually

LEASE = 1.5
EVALUATOR = Path(__file__).parent / "fake_evaluator.py"
PASSWORD = "open-sesame-5309"


class WorkerProcess:
    """A worker in its own process and session; its log lines are in `log`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def kill(self) -> None:
        """Send SIGKILL to the worker only; its evaluation process must end by itself."""
        self.process.kill()
        await self.process.wait()

    async def ended(self, seconds: float = 20) -> int:
        return await asyncio.wait_for(self.process.wait(), seconds)

    async def is_late(self) -> None:
        """Wait until this worker has committed one outcome, which did not count."""
        await eventually(lambda: [event["counts"] for event in self.events("outcome_committed")] == [False])

    def events(self, name: str = "") -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [event for line in lines if (event := strict_json(line))["event"] == name or not name]


class Daemon:
    """A daemon without agents: takes charge, enqueues given candidates, applies outcomes, restores lost data."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.store = SearchStore(redis, keys, SPEC)
        self.ledger: dict[str, Candidate] = {}
        self.population = Population()
        self.noted: list[Evaluation] = []

    async def begin(self) -> None:
        self.queue = await self.store.take_charge(previous_is_dead=True)
        history = await self.store.history()
        self.ledger, self.population = history.ledger, history.population
        await self.store.repair(self.queue, history)
        self.keeper = PopulationKeeper(
            self.queue, self.population, self.ledger, on_evaluation=lambda evaluation, _: self.noted.append(evaluation)
        )
        self._tasks = [
            asyncio.create_task(self.keeper.run()),
            asyncio.create_task(self.store.stay_in_charge(self.queue, self._memory)),
        ]

    def _memory(self) -> Memory:
        return Memory(History(self.ledger, self.population), PROFILE)

    async def issue(self, many: Sequence[Candidate]) -> None:
        for each in many:
            self.ledger[each.id] = each
            await self.queue.enqueue(each)

    async def settled(self, seconds: float = 60) -> None:
        """Wait until everything issued has its outcome; raises what the daemon's tasks raise."""
        settling = asyncio.create_task(self.keeper.settled())
        done, _ = await asyncio.wait({settling, *self._tasks}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if settling not in done:
            settling.cancel()
            for task in done:
                task.result()
            waiting = [id_ for id_ in self.ledger if id_ not in self.population]
            raise AssertionError(f"after {seconds} seconds {waiting} have no outcome")

    async def settle(self, many: Sequence[Candidate], seconds: float = 60) -> None:
        """Issue the candidates and wait until they have their outcomes."""
        await self.issue(many)
        await self.settled(seconds)

    async def measure(self, many: Sequence[Candidate]) -> None:
        """Issue the candidates and wait until everything issued is measured."""
        await self.issue(many)
        await self.measured(len(self.ledger))

    async def measured(self, count: int, seconds: float = 60) -> None:
        await eventually(lambda: self.population.outcomes >= count, seconds)

    def outcome(self, of: Candidate) -> Outcome:
        evaluation = self.population.get(of.id)
        assert evaluation is not None
        return evaluation.outcome

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass
class Kit:
    """A server, its search, and everything that a test started."""

    server: Server
    redis: Any
    keys: Keys
    folder: Path
    workers: list[WorkerProcess] = field(default_factory=list)
    daemons: list[Daemon] = field(default_factory=list)
    profile: ModelProfile = PROFILE
    """The profile that workers publish, for the spec of the running search."""
    disturbed: Counter[str] = field(default_factory=Counter)
    """Allowed extra evaluations by id, or under `*` for every id."""
    unsettled: bool = False
    """Whether the test intentionally ends before every candidate has its outcome."""

    @property
    def evaluations(self) -> Counter[str]:
        log = self.folder / "evaluated.log"
        return Counter(log.read_text().split()) if log.exists() else Counter()

    def write_script(self, behaviours: Mapping[str, Sequence[str]], prepare: str = "") -> Path:
        path = self.folder / "script.json"
        script = {
            "profile": self.profile.model_dump(mode="json"),
            "parameters": count_parameters(candidate((0.3,) * 4).plan, SHAPE).model_dump(),
            "log": str(self.folder / "evaluated.log"),
            "prepare": prepare,
            "behaviours": {"*": ["instant"], **behaviours},
        }
        path.write_text(json.dumps(script))
        return path

    async def daemon(self) -> Daemon:
        daemon = Daemon(self.redis, self.keys)
        await daemon.begin()
        self.daemons.append(daemon)
        return daemon

    async def worker(self, *, url: str = "", **options: Any) -> WorkerProcess:
        """Start a worker; `options` are WorkerOptions, `crash_at` and `unkillable`."""
        script = self.folder / "script.json"
        if not script.exists():
            self.write_script({})
        chosen = {
            "search": self.keys.search,
            "lease_seconds": LEASE,
            "grace_seconds": 5,
            "evaluation_process": [sys.executable, str(EVALUATOR), str(script)],
            **options,
        }
        log = self.folder / f"worker-{len(self.workers)}.log"
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.faults.worker_process",
                json.dumps(chosen),
                cwd=ROOT,
                env={**os.environ, "SELFPRUNER_REDIS__URL": url or self.server.url},
                stderr=file,
                start_new_session=True,
            )
        worker = WorkerProcess(process, log)
        self.workers.append(worker)
        return worker

    async def started(
        self, script: Mapping[str, Sequence[str]] | None = None, *, workers: int = 1, **options: Any
    ) -> tuple[Daemon, list[WorkerProcess]]:
        """Start a daemon, and workers with these `options` whose evaluations follow `script`."""
        if script is not None:
            self.write_script(script)
        return await self.daemon(), [await self.worker(**options) for _ in range(workers)]

    async def begun(self, daemon: Daemon, one: Candidate) -> None:
        """Issue `one` and wait until its evaluation has begun."""
        await daemon.issue([one])
        await self.evaluating(one.id)

    async def evaluating(self, id_: str, times: int = 1, seconds: float = 30) -> None:
        """Wait until the evaluation of `id_` has begun `times` times."""
        await eventually(lambda: self.evaluations[id_] >= times, seconds)

    async def beating(self, workers: int, seconds: float = 30) -> None:
        """Wait until that many workers have sent a heartbeat."""

        async def all_beat() -> bool:
            return len([key async for key in self.redis.scan_iter(match=self.keys.worker_prefix + "*")]) >= workers

        await eventually(all_beat, seconds)

    async def owner(self, worker: WorkerProcess) -> str:
        """Return the consumer name of a worker."""
        names = [name async for name in self.redis.scan_iter(match=self.keys.worker_prefix + f"*:{worker.pid}:*")]
        return str(names[0].removeprefix(self.keys.worker_prefix))

    async def pending(self) -> list[dict[str, Any]]:
        if not await self.redis.exists(self.keys.jobs):
            return []
        return list(await self.redis.xpending_range(self.keys.jobs, GROUP, "-", "+", 1000))

    async def has_released(self) -> None:
        """Wait until one job is pending, and handed back."""
        async with asyncio.timeout(30):
            while [row["consumer"] for row in await self.pending()] != ["released"]:
                await asyncio.sleep(0.02)

    async def dead(self) -> list[dict[str, str]]:
        return [fields for _, fields in await self.redis.xrange(self.keys.dead)]

    async def end(self) -> None:
        """End everything, workers by SIGTERM; first let the daemon restore what the server has lost."""
        if self.daemons and not self.unsettled:
            await eventually(self._complete, 10)
        for daemon in self.daemons:
            await daemon.end()
        left = [worker for worker in self.workers if worker.process.returncode is None]
        for worker in left:
            worker.send(signal.SIGTERM)
        for worker in left:
            try:
                await worker.ended(15)
            except TimeoutError:
                for child in worker.children():
                    child.kill()
                await worker.kill()
                raise AssertionError("a worker did not end when told to") from None

    async def _complete(self) -> bool:
        left = await self.redis.xlen(self.keys.jobs) + await self.redis.xlen(self.keys.results)
        return not left and await self.redis.llen(self.keys.applied) == self.daemons[-1].population.outcomes

    async def check(self) -> None:
        """Check the invariants."""
        await self._check_ends()
        await self._check_evaluations()
        await self._check_streams()
        self._check_logs()
        await self._check_nothing_left()

    async def _check_ends(self) -> None:
        if self.unsettled or not self.daemons:
            return
        daemon = self.daemons[-1]
        applied = await check_ends(self.redis, self.keys)
        assert sorted(applied) == sorted(daemon.ledger), "I1: the ledger on the server is the daemon's"
        assert applied == [e.candidate.id for e in daemon.population], "I2: applied in the population's order"
        assert len({e.candidate.id for e in daemon.noted}) == len(daemon.noted), "I2: each is told of once"

    async def _check_evaluations(self) -> None:
        for id_, times in self.evaluations.items():
            allowed = 1 + self.disturbed[id_] + self.disturbed["*"]
            assert times <= allowed, f"I3: {id_} was evaluated {times} times, {allowed} can be explained"

    async def _check_streams(self) -> None:
        for row in await self.pending():
            body = await self.redis.xrange(self.keys.jobs, row["message_id"], row["message_id"])
            assert body, f"I4: {row} has no body"
        written = [key async for key in self.redis.scan_iter(match=self.keys["*:restoring"])]
        assert not written, "I5: nothing is left of a restoring"

    def _check_logs(self) -> None:
        for worker in self.workers:
            text = worker.log.read_text()
            assert PASSWORD not in text, "I6: a secret is in the log"
            for line in text.splitlines():
                strict_json(line)  # I7

    async def _check_nothing_left(self) -> None:
        try:
            await eventually(lambda: not self.processes(), 10)
        except TimeoutError:
            raise AssertionError(f"I8: processes are left: {self.processes()}") from None

        await self.redis.connection_pool.disconnect()  # our own, as many as were busy at once

        async def alone() -> bool:
            return len(await self.redis.client_list(_type="normal")) == 1

        await eventually(alone, 10)

    def processes(self) -> list[str]:
        """Return the living processes whose command line names this test's folder."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if any(str(self.folder) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(words)[:200])
        return [line for line in found if "-server" not in line]


async def check_ends(redis: Any, keys: Keys) -> list[str]:
    """Check I1 and I2 on the server, and return the applied ids in their order."""
    issued, applied = [await redis.lrange(key, 0, -1) for key in (keys.issued, keys.applied)]
    assert sorted(applied) == sorted(issued), "I1: every issued candidate has one outcome"
    assert len(set(applied)) == len(applied), "I2: nothing is applied twice"
    assert set(applied) == set(await redis.hkeys(keys.outcomes)), "I2: applied ids have outcomes"
    assert set(issued) == set(await redis.hkeys(keys.candidates)), "I1: what is issued is in the ledger"
    lengths = [await redis.xlen(key) for key in (keys.jobs, keys.results)]
    assert not any([*lengths, await redis.exists(keys.done, keys.deaths)]), "I1: nothing is left at the end"
    return list(applied)


def strict_json(line: str) -> dict[str, Any]:
    """Parse the JSON object of a line; fails for NaN and the like."""

    def refuse(word: str) -> None:
        raise AssertionError(f"I7: {word} is no JSON: {line}")

    value = json.loads(line, parse_constant=refuse)
    assert isinstance(value, dict)
    return value


@asynccontextmanager
async def fault_kit(server: Server, folder: Path) -> AsyncIterator[Kit]:
    """A kit whose invariants are checked when the block succeeds."""
    redis = connect(server.url)
    kit = Kit(server, redis, Keys("faults"), folder)
    try:
        yield kit
        await kit.end()
        await kit.check()
    finally:
        for daemon in kit.daemons:
            await daemon.end()
        for worker in kit.workers:
            for child in worker.children():
                child.kill()
            if worker.process.returncode is None:
                await worker.kill()
        await redis.aclose()


__all__ = ["LEASE", "PASSWORD", "Daemon", "Kit", "WorkerProcess", "candidates", "eventually", "fault_kit"]
