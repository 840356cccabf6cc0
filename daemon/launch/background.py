"""Background tasks of a daemon: wait for the model profile, watch workers, requeue lost candidates."""

import asyncio
from collections.abc import Callable

import structlog

from daemon.state.history import History
from daemon.state.store import SearchStore
from protocol.errors import UsageError
from protocol.plans.profile import ModelProfile
from protocol.queue.streams import CandidateQueue

REPAIR_SECONDS = 60.0

log = structlog.get_logger()


async def wait_for_profile(store: SearchStore) -> ModelProfile:
    """Wait for the model profile and return it; log once that the daemon waits."""
    waiting = False
    while (profile := await store.profile()) is None:
        if not waiting:
            log.info("waiting_for_worker", needs="the model profile")
        waiting = True
        await asyncio.sleep(0.5)
    log.info("model_profile", dense_perplexity=round(profile.dense.perplexity, 3), units=len(profile.sensitivity))
    return profile


async def watch_workers(store: SearchStore, ours_have_ended: Callable[[], bool]) -> None:
    """Log unusable workers. Raises UsageError if our own workers have exited for good and no other worker is usable."""
    logged: dict[str, None] = {}  # in order
    while True:
        workers = await store.workers()
        unusable = [worker for worker in workers if worker.stage == "unusable"]
        for worker in unusable:
            if worker.detail not in logged:
                log.error("worker_unusable", worker=worker.consumer, detail=worker.detail)
            logged[worker.detail] = None
        if len(unusable) == len(workers) and ours_have_ended():
            raise UsageError(next(iter(logged), "no worker can work; the log says why"))
        await asyncio.sleep(0.5)


async def repair_forever(store: SearchStore, queue: CandidateQueue, history: Callable[[], History]) -> None:
    """Requeue candidates of `history` whose jobs were lost, for example in a trimmed stream or a power failure."""
    while True:
        await asyncio.sleep(REPAIR_SECONDS)
        await store.repair(queue, history())
