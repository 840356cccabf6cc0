"""The worker: claims candidates, has them measured by a child process, and commits the outcomes.

This parent holds no model: whatever happens to the child (a crash of CUDA, the OOM killer, a hang), the parent goes on
beating, makes a new child, and the candidate is measured again or committed as failed.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import uuid
from dataclasses import asdict, dataclass
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gpu_worker.progress import LogThrottle
from gpu_worker.worker.evaluator import EVALUATION_PROCESS, ChildDied, DeviceLost, EvaluationChild
from gpu_worker.worker.gpu_lock import take_gpu
from gpu_worker.worker.profile_check import check_profile
from gpu_worker.worker.spec_watch import SpecWatch, SpecWithdrawn
from protocol.errors import StoreError, UsageError, first_error
from protocol.plans.candidate import Failed, Outcome
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import AWAY, Patience, check_server, connect
from protocol.queue.control import Control
from protocol.queue.jobs import MOST_DEATHS, Job, JobQueue
from protocol.queue.keys import Keys, read_entry, read_stored
from protocol.queue.profile_board import ProfileBoard
from protocol.queue.self_text import SelfTextBoard

MAX_FAILED_STARTS = 3
"""After so many deaths of the child while it gets ready, the worker gives up."""
IDLE_GRACE_SECONDS = 2.0
"""Beside the grace time of an evaluation: for a read that blocks. A server that is away is not waited for."""

log = structlog.get_logger()


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker works. Times in seconds."""

    redis_url: str
    search: str
    lease_seconds: float = 30.0
    max_evaluation_seconds: float = 1800.0
    max_preparation_seconds: float = 14_400.0
    """For loading and calibrating the model; a large one over a slow network takes hours."""
    grace_seconds: float = 20.0
    """After SIGTERM, how long the running evaluation may still take before the job is handed back."""
    own_gpu: bool = False
    """Take a GPU that no other worker of this machine has."""
    spec: str | None = None
    """The fingerprint of the only spec to work on; None: of whichever the search has."""
    evaluation_process: tuple[str, ...] = EVALUATION_PROCESS
    """The command that starts the child."""


@dataclass
class Status:
    """What the worker says of itself with each beat (protocol.queue.worker_status.WorkerStatus reads it)."""

    stage: str = "loading"
    done: int = 0
    total: int = 0
    measured: int = 0
    detail: str = ""

    def to_json(self) -> str:
        """The status as JSON."""
        return json.dumps(asdict(self))


class Worker:
    """One worker of one search."""

    def __init__(self, redis: Redis, options: WorkerOptions) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._options = options
        self._keys = Keys(options.search)
        self._consumer = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._queue = JobQueue(redis, self._keys, self._consumer, lease_seconds=options.lease_seconds)
        self._control = Control(redis, self._keys)
        self._profiles = ProfileBoard(redis, self._keys)
        self._patiently = Patience(redis, self._keys.jobs)
        self._status = Status()
        self._logged = LogThrottle()
        self._job: Job | None = None
        self._stopping = asyncio.Event()
        self._beats: set[asyncio.Task[bool]] = set()

    async def run(self) -> None:
        """Work until `stop` is called. Raises UsageError for what the user must mend."""
        structlog.contextvars.bind_contextvars(search=self._options.search, worker=self._consumer)
        if self._options.own_gpu:
            log.info("gpu_taken", gpu=await take_gpu())
        await self._patiently(lambda: check_server(self._redis))
        try:
            await self._work_and_beat()
        except UsageError as error:
            await self._report_unusable(error)
            raise

    async def _work_and_beat(self) -> None:
        """Work and beat until stopped; whatever ends it, what is ours is handed back, for it is no job's fault."""
        try:
            async with asyncio.TaskGroup() as group:
                beats = group.create_task(self._beat_for_ever())
                await self._until_stopped(group.create_task(self._work()))
                beats.cancel()
        except BaseExceptionGroup as group:
            error = first_error(group)
            if error is None:
                raise
            raise error from None
        finally:
            with contextlib.suppress(*AWAY, RedisError):  # it must not hide what ended the worker
                await self._queue.release()

    async def _report_unusable(self, error: UsageError) -> None:
        """Leave word for a lease of what the user must mend; the end waits for no server."""
        status = Status(stage="unusable", detail=str(error))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_GRACE_SECONDS):
                await self._queue.beat(None, status.to_json())

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Take nothing new; finish what is running if that takes no longer than the grace time."""
        self._stopping.set()

    async def _work(self) -> None:
        while not self._stopping.is_set():
            spec = await self._wait_for_spec()
            if spec is not None:
                try:
                    await self._work_on(spec)
                except SpecWithdrawn as reason:
                    await self._abandon(spec, reason)

    async def _abandon(self, spec: SearchSpec, reason: SpecWithdrawn) -> None:
        """Say why `spec` is not prepared, and hand back the job that the model was being loaded again for."""
        log.warning("preparation_given_up", spec=spec.fingerprint, reason=str(reason))
        if self._job is not None:
            self._job = None
            with contextlib.suppress(*AWAY, RedisError):  # the lease runs out where the server does not answer
                await self._queue.release()

    async def _until_stopped(self, work: asyncio.Task[None]) -> None:
        """Return when `work` has ended; after a stop, at the latest when the grace time is over."""
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        grace = self._options.grace_seconds if self._job else 0.0
        await asyncio.wait({work}, timeout=grace + IDLE_GRACE_SECONDS)
        work.cancel()

    async def _beat_for_ever(self) -> None:
        lost: Job | None = None
        while True:
            job = self._job
            held = await self._queue.beat(job, self._status.to_json())
            if job and not held and job is self._job and job is not lost:  # and not committed meanwhile
                lost = job
                log.warning("lease_lost", candidate=job.candidate.id)
            await asyncio.sleep(self._options.lease_seconds / 3)

    async def _wait_for_spec(self) -> SearchSpec | None:
        waiting = False
        while not self._stopping.is_set():
            spec = await self._spec()
            if spec and self._options.spec in (None, spec.fingerprint) and await self._control.read() != "stop":
                return spec
            if not waiting:
                log.info("waiting_for_search")
            waiting = True
            await asyncio.sleep(0.5)
        return None

    async def _spec(self) -> SearchSpec | None:
        """The search's spec; None where there is none, or a damaged one, which its daemon replaces."""
        text = await self._spec_text()
        return read_entry(SearchSpec, text, self._keys.spec) if text else None

    async def _readable_spec(self) -> SearchSpec | None:
        """The search's spec, None where there is none; raises StoreError for a damaged one."""
        text = await self._spec_text()
        return read_stored(SearchSpec, text, self._keys.spec) if text else None

    async def _spec_text(self) -> str | None:
        text: str | None = await self._patiently(lambda: self._redis.get(self._keys.spec))
        return text

    async def _work_on(self, spec: SearchSpec) -> None:
        """Measure candidates of this spec until told to stop, or until the search has another spec."""
        board = SelfTextBoard(self._redis, self._keys, spec.fingerprint)
        child = EvaluationChild(spec, self._options.evaluation_process, board=board)
        try:
            profile = await self._prepare(child, spec)
            while not self._stopping.is_set():
                self._status.stage = "idle"
                paused = await self._control.read() != "run"
                self._job = None if paused else await self._queue.claim()
                if self._job is None:
                    if not await self._is_still_wanted(spec, profile):
                        return
                    await asyncio.sleep(0.5 if paused else 0)
                    continue
                if self._job.fingerprint != spec.fingerprint and not await self._is_stale(self._job, spec):
                    return  # the job stays ours, and is found again when the new spec is loaded
                if self._job is not None:
                    await self._measure(child, self._job)
        finally:
            await child.kill()

    async def _is_still_wanted(self, spec: SearchSpec, profile: ModelProfile) -> bool:
        """Whether the search has this spec; publishes `profile` again where it is lost, for a new daemon waits for it.

        A search that is gone altogether may come back, so a model that is ready is kept for it.
        """
        if await self._profiles.publish(profile) is not None:
            return True
        try:
            current = await self._spec()
        except StoreError:  # whatever was written there, the daemon that is in charge writes its own again
            return True
        if current is None or current.fingerprint == spec.fingerprint:
            return True
        log.warning("spec_changed", current=current.fingerprint, loaded=spec.fingerprint)
        return False

    async def _is_stale(self, job: Job, spec: SearchSpec) -> bool:
        """Whether a job of another spec is the one that is out of date (it then fails), and not this worker."""
        current = await self._wait_for_spec()
        if current is None or current.fingerprint != spec.fingerprint:
            log.warning("spec_changed", current=current and current.fingerprint, loaded=spec.fingerprint)
            return False
        await self._queue.commit(job, Failed(reason="invalid", detail="it was issued under another spec"))
        self._job = None
        return True

    async def _prepare(self, child: EvaluationChild, spec: SearchSpec) -> ModelProfile:
        """Make the model ready; returns the profile that the search has, or shall have, of it.

        Raises SpecWithdrawn, with the preparation ended, when the search has moved on.
        """
        patience = self._options.lease_seconds
        watch = SpecWatch(spec.fingerprint, self._readable_spec, self._control.read, patience_seconds=patience)
        return await watch.run(self._start_and_check(child, spec))

    async def _start_and_check(self, child: EvaluationChild, spec: SearchSpec) -> ModelProfile:
        known = await self._profiles.read(spec.fingerprint)
        profile = await self._start_child(child, sensitivity=known is None)
        counts = await self._profiles.publish(known or profile) or known or profile
        check_profile(counts, profile)
        log.info(
            "model_ready",
            model=profile.model,
            dense_perplexity=round(profile.dense.perplexity, 3),
            device=profile.device,
        )
        return counts

    async def _start_child(self, child: EvaluationChild, *, sensitivity: bool) -> ModelProfile:
        limit = self._options.max_preparation_seconds
        for death in range(1, MAX_FAILED_STARTS + 1):
            try:
                return await child.start(self._show_progress, sensitivity=sensitivity, limit_seconds=limit)
            except ChildDied as error:
                last = f"{error} at {self._status.stage!r}"
                log.error("evaluation_process_died", error=last, death=death, of=MAX_FAILED_STARTS)
                await asyncio.sleep(death)
        raise UsageError(f"the target model cannot be made ready: {last}, {MAX_FAILED_STARTS} times; see the log")

    async def _measure(self, child: EvaluationChild, job: Job) -> None:
        self._status.stage = "evaluating"
        with structlog.contextvars.bound_contextvars(candidate=job.candidate.id):
            outcome = await self._outcome(child, job)
            if outcome is not None:
                first = await self._queue.commit(job, outcome)
                figures = outcome.model_dump(exclude={"parameters"}, exclude_none=True)
                log.info("outcome_committed", counts=first, **figures)
            self._job = None
            self._status.measured += 1

    async def _outcome(self, child: EvaluationChild, job: Job) -> Outcome | None:
        """The outcome of `job`; None when it was given up because evaluation processes die on it.

        What may be the machine's fault is tried once more: a lost device with a new process, and a lack of memory, for
        the process has freed what it could.
        """
        may_be_retried, died = True, 0
        while True:
            try:
                outcome = await self._evaluated(child, job)
            except DeviceLost as error:
                outcome = Failed(reason="crashed", detail=str(error))
            except ChildDied as error:
                died += 1  # counted here too: the job may have become another worker's
                deaths = max(died, await self._queue.count_death(job, uuid.uuid4().hex))
                log.error("evaluation_process_died", error=str(error), death=deaths, of=MOST_DEATHS)
                if deaths >= MOST_DEATHS:
                    await self._queue.give_up(
                        job, f"{error}; evaluation processes or workers died on it {deaths} times"
                    )
                    return None
                continue
            retry = may_be_retried and isinstance(outcome, Failed) and outcome.reason in ("crashed", "out-of-memory")
            if not retry:
                return outcome
            may_be_retried = False
            log.warning("evaluated_again", **outcome.model_dump())

    async def _evaluated(self, child: EvaluationChild, job: Job) -> Outcome:
        if not child.alive:
            await self._prepare(child, child.spec)
            self._status.stage = "evaluating"
        return await child.evaluate(job.candidate, limit_seconds=self._options.max_evaluation_seconds)

    def _show_progress(self, stage: str, done: int, total: int) -> None:
        if self._logged.should_log(stage, done, total):
            left = self._logged.seconds_left(done, total)
            log.info("preparing", stage=stage, done=done, total=total, seconds_left=left)
        self._status.stage, self._status.done, self._status.total = stage, done, total
        beat = asyncio.create_task(self._queue.beat(self._job, self._status.to_json()))
        self._beats.add(beat)
        beat.add_done_callback(self._beats.discard)


async def run_worker(options: WorkerOptions) -> None:
    """Connect and work until SIGTERM or SIGINT; a second signal ends the process at once."""
    redis = connect(options.redis_url)
    try:
        worker = Worker(redis, options)

        def on_signal(number: signal.Signals) -> None:
            if worker.stopping:
                os._exit(128 + number)  # the evaluation process ends with its parent, and the lease runs out
            worker.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        await worker.run()
    finally:
        await redis.aclose()
