"""What a daemon does beside the search, as long as it runs."""

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
    """The model profile; logs once that it waits."""
    waiting = False
    while (profile := await store.profile()) is None:
        if not waiting:
            log.info("waiting_for_worker", needs="the model profile")
        waiting = True
        await asyncio.sleep(0.5)
    log.info("model_profile", dense_perplexity=round(profile.dense.perplexity, 3), units=len(profile.sensitivity))
    return profile


async def watch_workers(store: SearchStore, ours_have_ended: Callable[[], bool]) -> None:
    """Tell of workers that cannot work; where our own have ended so and there is no other, the search ends too."""
    complained: dict[str, None] = {}  # in order
    while True:
        workers = await store.workers()
        unusable = [worker for worker in workers if worker.stage == "unusable"]
        for worker in unusable:
            if worker.detail not in complained:
                log.error("worker_unusable", worker=worker.consumer, detail=worker.detail)
            complained[worker.detail] = None
        if len(unusable) == len(workers) and ours_have_ended():
            raise UsageError(next(iter(complained), "no worker can work; the log says why"))
        await asyncio.sleep(0.5)


async def repair_forever(store: SearchStore, queue: CandidateQueue, history: Callable[[], History]) -> None:
    """Put candidates of `history` back whose jobs were lost: a trimmed stream, a server's last second."""
    while True:
        await asyncio.sleep(REPAIR_SECONDS)
        await store.repair(queue, history())
