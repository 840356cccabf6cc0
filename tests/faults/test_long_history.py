"""A search of 100,000 candidates: no request to the server and no step of the daemon may take long."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from daemon.state.history import History, Memory
from daemon.state.store import SearchStore
from protocol.plans.candidate import KeptSelection
from protocol.plans.plan import Plan
from protocol.queue.streams import PART
from tests.faults.kit import Kit
from tests.faults.marks import slow_fault
from tests.support.root import ROOT
from tests.support.samples import PROFILE, SPEC, candidate, measured

COUNT = 100_000
LONGEST_REQUEST_MS, LONGEST_STEP_SECONDS = 1_000, 2.0
"""Generous: both are some tens of milliseconds on an idle machine, and a daemon may be silent for six seconds."""


def long_history(count: int) -> History:
    """Return `count` candidates of 32 layers; the last hundred have no outcome."""
    small = candidate((0.3,) * 4)
    model = small.model_copy(update={"rates": small.rates * 8, "plan": Plan(layers=small.plan.layers * 8)})
    outcome = measured(5.0, small)
    history = History(selections={1: KeptSelection(parents=("a", "b"))})
    for number in range(count):
        id_ = f"{number:016x}"
        history.ledger[id_] = one = model.model_copy(update={"id": id_})
        if number < count - 100:
            history.population.insert(one, outcome)
    return history


def parts_of(history: History) -> dict[str, Any]:
    """Return the history's parts in a form that can be compared."""
    return vars(history) | {"population": list(history.population)}


@asynccontextmanager
async def longest_step() -> AsyncIterator[list[float]]:
    """Measures the longest time that the event loop is busy; the list holds it at the end.

    It is the thread's own time, which does not count what other processes of a busy machine take.
    """
    gaps = [0.0]

    async def tick() -> None:
        while True:
            last = time.thread_time()
            await asyncio.sleep(0.01)
            gaps[0] = max(gaps[0], time.thread_time() - last)

    ticking = asyncio.create_task(tick())
    yield gaps
    ticking.cancel()


@pytest.mark.timeout(600)
@slow_fault("51", "100,000 candidates are lost, and read again", "FLUSHALL", "no request over 1 s, no silence")
async def test_a_long_history_is_restored_and_read_in_short_requests(kit: Kit) -> None:
    kit.unsettled = True
    history = long_history(COUNT)
    redis = kit.redis
    store = SearchStore(redis, kit.keys, SPEC)
    queue = await store.take_charge()
    queue.issued = len(history.ledger)
    await redis.config_set("slowlog-log-slower-than", LONGEST_REQUEST_MS * 1000)
    async with longest_step() as gaps:
        living = asyncio.create_task(store.stay_in_charge(queue, lambda: Memory(history, PROFILE)))
        await redis.flushall()
        seen: set[str | None] = set()
        while queue.applied < history.population.outcomes or await redis.xlen(kit.keys.jobs) < 100:
            await asyncio.sleep(0.2)
            assert not living.done()
            seen.add(await redis.get(kit.keys.daemon))
        found = await store.history()
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
    slow = await redis.slowlog_get()
    await redis.flushall()
    assert parts_of(found) == parts_of(history)
    assert not slow, [(entry["duration"], entry["command"][:60]) for entry in slow]
    assert gaps[0] < LONGEST_STEP_SECONDS
    assert len(seen - {None}) == 1


RESTORE = """
import asyncio, os, signal, sys
from daemon.state import store as store_module
from daemon.state.history import Memory
from daemon.state.restoring import Restorer
from protocol.queue.connection import connect
from protocol.queue.keys import Keys
from tests.faults.test_long_history import long_history
from tests.support.samples import PROFILE, SPEC

class Mortal(Restorer):
    left = int(sys.argv[2])

    async def _fenced(self, script):
        answer = await super()._fenced(script)
        Mortal.left -= 1
        if not Mortal.left:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

async def main():
    store_module.Restorer = Mortal
    store = store_module.SearchStore(connect(os.environ["SELFPRUNER_REDIS__URL"]), Keys("faults"), SPEC)
    queue = await store.take_charge(previous_is_dead=True)
    memory = Memory(long_history(int(sys.argv[1])), PROFILE, "pause")
    await store.restore(queue, lambda: memory, from_="the test")

asyncio.run(main())
"""


@slow_fault("52", "killed while it restores", "SIGKILL after 1 to 10 of 10 steps", "the next one completes it")
async def test_a_daemon_that_is_killed_while_it_restores_leaves_it_to_the_next_one(kit: Kit) -> None:
    kit.unsettled = True
    count = 4 * PART
    history = long_history(count)
    steps = 1 + 4 + 4 + 1  # the fence, then candidates, outcomes and selections; one more moves them into place
    for step in (1, 2, 5, 7, steps):
        await kit.redis.flushall()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", RESTORE, str(count), str(step)),
            cwd=ROOT,
            env={**os.environ, "SELFPRUNER_REDIS__URL": kit.server.url},
        )
        assert await process.wait() == -signal.SIGKILL
        assert await kit.redis.llen(kit.keys.restoring(kit.keys.issued)) == min(step - 1, 4) * PART
        assert await kit.redis.llen(kit.keys.issued) == 0, "the real keys are as they were"
        store = SearchStore(kit.redis, kit.keys, SPEC)
        queue = await store.take_charge(previous_is_dead=True)
        assert parts_of(await store.history()) == parts_of(History())
        await store.restore(queue, lambda: Memory(history, PROFILE, "pause"), from_="the test")
        assert parts_of(await store.history()) == parts_of(history)
        assert await kit.redis.get(kit.keys.control) == "pause"
    await kit.redis.flushall()
