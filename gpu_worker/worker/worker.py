"""The worker: claims candidates, lets a child process measure them, and commits the outcomes.

This parent process holds no model. If the child crashes, hangs or runs out of memory, the parent keeps the candidate's
lease, starts a new child, and measures the candidate again or commits it as failed.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gpu_worker.progress import LogThrottle
from gpu_worker.worker.evaluator import ChildDied, DeviceLost, EvaluationChild
from gpu_worker.worker.gpu_lock import take_gpu
from gpu_worker.worker.options import WorkerOptions
from gpu_worker.worker.spec_watch import SpecWatch, SpecWithdrawn
from gpu_worker.worker.work_time import WorkTime
from protocol.errors import StoreError, UsageError, first_error
from protocol.plans.candidate import Failed, Outcome, outcome_fields
from protocol.plans.profile import ModelProfile, check_profile
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import UNREACHABLE_ERRORS, RedisRetry, check_server, connect
from protocol.queue.control import Control, has_ended
from protocol.queue.jobs import MOST_DEATHS, Job, JobQueue
from protocol.queue.keys import Keys, parse_stored, parse_unless_damaged
from protocol.queue.profile_board import ProfileBoard
from protocol.queue.self_text import SelfTextBoard
from protocol.queue.worker_status import WorkerStatus

MAX_FAILED_STARTS = 3
"""The worker gives up after the child has died this many times while it prepares the model."""
IDLE_GRACE_SECONDS = 2.0
"""Extra seconds after the grace time, so that a blocking Redis read can return. A stopping worker does not wait longer,
even if the server is down."""

ALIVE_SECONDS = 5.0
"""Seconds between two touches of --alive-file."""

PUBLISHED = "published as the worker's status"
"""A note on an error that the daemon knows and logs."""

log = structlog.get_logger()


class Worker:
    """One worker of one search."""

    def __init__(self, redis: Redis, options: WorkerOptions) -> None:
        self._redis: Any = redis  # redis's type hints cannot express that replies are str
        self._options = options
        self._keys = Keys(options.search)
        self._consumer = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._queue = JobQueue(redis, self._keys, self._consumer, lease_seconds=options.lease_seconds)
        self._control = Control(redis, self._keys)
        self._profiles = ProfileBoard(redis, self._keys)
        self._retry = RedisRetry(redis, self._keys.jobs)
        self._status = WorkerStatus(stage="loading")
        self._time = WorkTime()
        self._logged = LogThrottle()
        self._job: Job | None = None
        self._stopping = asyncio.Event()
        self._idle_since = time.monotonic()
        self._saw_it_run = False
        self._beats: set[asyncio.Task[bool]] = set()

    async def run(self) -> None:
        """Work until `stop` is called.

        Raises UsageError for invalid input, with the note PUBLISHED if it could be published.
        """
        structlog.contextvars.bind_contextvars(search=self._options.search, worker=self._consumer)
        living = asyncio.create_task(self._show_life_for_ever(self._options.alive_file))
        try:
            if self._options.own_gpu:
                log.info("gpu_taken", gpu=await take_gpu())
            await self._retry(lambda: check_server(self._redis))
            await self._work_and_beat()
        except UsageError as error:
            if await self._report_unusable(error):
                error.add_note(PUBLISHED)
            raise
        finally:
            living.cancel()

    async def _work_and_beat(self) -> None:
        """Work and send heartbeats until stopped.

        On exit, hand the current job back, so that another worker takes it at once and no death is counted against it.
        """
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
            with contextlib.suppress(*UNREACHABLE_ERRORS, RedisError):  # must not mask the original error
                await self._queue.release()

    async def _report_unusable(self, error: UsageError) -> bool:
        """Publish the error as the worker's status, which expires after the length of a lease.

        Waits at most IDLE_GRACE_SECONDS for a server that is down. Return whether it was published.
        """
        status = WorkerStatus(stage="unusable", detail=str(error).encode("utf-8", "backslashreplace").decode())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(IDLE_GRACE_SECONDS):
                await self._queue.beat(None, status.to_json())
                return True
        return False

    @property
    def stopping(self) -> bool:
        """Return whether `stop` has been called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Claim no more candidates, and finish the running evaluation if it ends within the grace time."""
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
        """Log why the preparation of `spec` was cancelled, and hand back the job that it was started for, if any."""
        log.warning("preparation_given_up", spec=spec.fingerprint, reason=str(reason))
        if self._job is not None:
            self._job = None
            with contextlib.suppress(*UNREACHABLE_ERRORS, RedisError):  # the lease expires if no server answers
                await self._queue.release()

    async def _until_stopped(self, work: asyncio.Task[None]) -> None:
        """Return when `work` has ended or, after a stop, when the grace time is over."""
        stop = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if self._job or self._status.stage == "idle":  # a preparation is ended at once
            grace = self._options.grace_seconds if self._job else 0.0
            await asyncio.wait({work}, timeout=grace + IDLE_GRACE_SECONDS)
        work.cancel()

    async def _show_life_for_ever(self, file: Path | None) -> None:
        """Touch the file, whether or not the server answers: a probe must not kill workers because Redis is down."""
        was_written = True
        while file is not None:
            try:
                await asyncio.to_thread(file.touch)
                was_written = True
            except OSError as error:  # the probe sees it; work that goes well must not end for it
                if was_written:
                    log.warning("alive_file_not_written", file=str(file), error=error.strerror)
                was_written = False
            await asyncio.sleep(ALIVE_SECONDS)

    async def _beat_for_ever(self) -> None:
        lost: Job | None = None
        while True:
            job = self._job
            held = await self._queue.beat(job, self._status_now())
            if job and not held and job is self._job and job is not lost:  # still our job, and not logged yet
                lost = job
                log.warning("lease_lost", candidate=job.candidate.id)
            await asyncio.sleep(self._options.lease_seconds / 3)

    async def _wait_for_spec(self) -> SearchSpec | None:
        waiting = False
        self._idle_since = time.monotonic()
        while not self._stopping.is_set() and not await self._leaves():
            spec = await self._spec()
            if spec and self._options.spec in (None, spec.fingerprint) and await self._control.read() != "stop":
                return spec
            if not waiting:
                log.info("waiting_for_search")
            waiting = True
            await asyncio.sleep(0.5)
        return None

    async def _spec(self) -> SearchSpec | None:
        """Return the search's spec; None if it is missing or damaged. The daemon replaces a damaged spec."""
        text = await self._spec_text()
        return parse_unless_damaged(SearchSpec, text, self._keys.spec) if text else None

    async def _readable_spec(self) -> SearchSpec | None:
        """Return the search's spec; None if it is missing. Raises StoreError if it is damaged."""
        text = await self._spec_text()
        return parse_stored(SearchSpec, text, self._keys.spec) if text else None

    async def _spec_text(self) -> str | None:
        text: str | None = await self._retry(lambda: self._redis.get(self._keys.spec))
        return text

    async def _work_on(self, spec: SearchSpec) -> None:
        """Measure candidates of this spec until stopped, or until the search has another spec."""
        board = SelfTextBoard(self._redis, self._keys, spec.fingerprint)
        child = EvaluationChild(spec, self._options.evaluation_process, board=board)
        try:
            profile = await self._prepare(child, spec)
            self._idle_since = time.monotonic()
            self._time.begin()
            while not self._stopping.is_set():
                self._set_status(stage="idle")
                paused = await self._control.read() != "run"
                if paused:
                    self._idle_since = time.monotonic()
                self._job = None if paused else await self._queue.claim()
                if self._job is None:
                    if await self._leaves() or not await self._is_still_wanted(spec, profile):
                        return
                    await asyncio.sleep(0.5 if paused else 0)
                    continue
                if self._job.fingerprint != spec.fingerprint and not await self._is_stale(self._job, spec):
                    return  # keep the job: it is claimed again once the new spec is loaded
                if self._job is not None:
                    await self._measure(child, self._job)
                    self._idle_since = time.monotonic()
        finally:
            await child.kill()

    async def _leaves(self) -> bool:
        """Stop, and return True, if this worker is to exit because the search has ended or has no work for it."""
        options, idle = self._options, time.monotonic() - self._idle_since
        if options.exit_when_done and await self._has_ended():
            log.info("worker_leaves", reason="the search has ended")
            self.stop()
        elif options.idle_seconds is not None and idle >= options.idle_seconds:
            log.info("worker_leaves", reason=f"there was no candidate for {idle:.0f} s")
            self.stop()
        return self.stopping

    async def _has_ended(self) -> bool:
        """Return whether the search has ended while this worker was there: a search may be continued after its end."""
        ended: bool = await self._retry(lambda: has_ended(self._redis, self._keys))
        self._saw_it_run |= not ended
        return ended and self._saw_it_run

    async def _is_still_wanted(self, spec: SearchSpec, profile: ModelProfile) -> bool:
        """Return whether the search still has this spec; publish `profile` again if the server has lost the profile.

        A loaded model is kept when the search is missing, because the search may come back.
        """
        if await self._profiles.publish(profile) is not None:
            return True
        try:
            current = await self._spec()
        except StoreError:  # the daemon in charge will replace the damaged spec
            return True
        if current is None or current.fingerprint == spec.fingerprint:
            return True
        log.warning("spec_changed", current=current.fingerprint, loaded=spec.fingerprint)
        return False

    async def _is_stale(self, job: Job, spec: SearchSpec) -> bool:
        """Return whether `job`, which belongs to another spec, is outdated. If so, commit it as failed.

        The job is outdated if the search still has `spec`. Otherwise `spec` is outdated, and the job is kept.
        """
        current = await self._wait_for_spec()
        if current is None or current.fingerprint != spec.fingerprint:
            log.warning("spec_changed", current=current and current.fingerprint, loaded=spec.fingerprint)
            return False
        await self._queue.commit(job, Failed(reason="invalid", detail="the candidate was issued under another spec"))
        self._job = None
        return True

    async def _prepare(self, child: EvaluationChild, spec: SearchSpec) -> ModelProfile:
        """Prepare the model and return the published profile.

        Raises SpecWithdrawn, after cancelling the preparation, when the search no longer needs the spec.
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
        raise UsageError(f"the target model cannot be prepared: {last}, {MAX_FAILED_STARTS} times; see the log")

    async def _measure(self, child: EvaluationChild, job: Job) -> None:
        self._set_status(stage="evaluating")
        with structlog.contextvars.bound_contextvars(candidate=job.candidate.id):
            outcome = await self._outcome(child, job)
            if outcome is not None:
                first = await self._queue.commit(job, outcome)
                fields = outcome_fields(job.candidate, outcome) | outcome.model_dump(include={"tokens", "seconds"})
                log.info("outcome_committed", counts=first, kind=outcome.kind, **fields)
            self._job = None
            self._set_status(measured=self._status.measured + 1)

    async def _outcome(self, child: EvaluationChild, job: Job) -> Outcome | None:
        """Return the outcome of `job`; None if the job was given up because too many processes died on it.

        A failure that may be the machine's fault is retried once. After a lost device, the retry runs in a new process;
        after out of memory, it runs in the same process, which has freed the memory of the failed evaluation.
        """
        may_be_retried, died = True, 0
        while True:
            try:
                outcome = await self._evaluated(child, job)
            except DeviceLost as error:
                outcome = Failed(reason="crashed", detail=str(error))
            except ChildDied as error:
                died += 1  # counted here too, because the server counts a death only while this worker owns the job
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
            self._set_status(stage="evaluating")
        with self._time.measuring():
            return await child.evaluate(job.candidate, limit_seconds=self._options.max_evaluation_seconds)

    def _status_now(self) -> str:
        """Return the status as the value of the worker's key."""
        return self._status.model_copy(update=self._time.fields()).to_json()

    def _set_status(self, **changes: str | int | None) -> None:
        self._status = self._status.model_copy(update=changes)

    def _show_progress(self, stage: str, done: int, total: int) -> None:
        should_log = self._logged.should_log(stage, done, total)
        left = self._logged.seconds_left(done, total)
        if should_log:
            log.info("preparing", stage=stage, done=done, total=total, seconds_left=left)
        self._set_status(stage=stage, done=done, total=total, seconds_left=left)
        beat = asyncio.create_task(self._queue.beat(self._job, self._status_now()))
        self._beats.add(beat)
        beat.add_done_callback(self._beats.discard)


async def run_worker(options: WorkerOptions) -> None:
    """Connect and work until SIGTERM or SIGINT; a second signal ends the process immediately."""
    redis = connect(options.redis_url)
    try:
        worker = Worker(redis, options)

        def on_signal(number: signal.Signals) -> None:
            if worker.stopping:
                os._exit(128 + number)  # the evaluation process ends with its parent, and the lease expires
            worker.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        await worker.run()
    finally:
        await redis.aclose()
