"""A search that can be run, with its observer and its HTTP API."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis

from agents.llm.endpoint import Degraded, EndpointState, LlmState, Usage
from daemon.monitor.observer import Observer
from daemon.search.modes import rounds_of
from daemon.search.search import Search
from daemon.state.history import History
from protocol.plans.candidate import Candidate, Failed, Measured
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from tests.support.conducted import Conducted, Evaluator, evaluating, unevenness
from tests.support.http_client import Asked, served
from tests.support.samples import PROFILE, SPEC


class QuietChat:
    """The part of a Chat that an observer uses."""

    def __init__(self) -> None:
        self.degraded: Degraded | None = None
        self.usage = {
            "scripted": Usage(requests=7, answers=5, seconds=10, errors=1, prompt_tokens=900, completion_tokens=80)
        }

    @property
    def costs(self) -> dict[str, float]:
        return {"scripted": 0.25}

    @property
    def state(self) -> LlmState:
        return LlmState(degraded=self.degraded, endpoints=(EndpointState(name="scripted", state="closed"),))


class Observed:
    """A search that can be run, its observer, and its API."""

    def __init__(self, conducted: Conducted, search: Search, observer: Observer, ask: Asked) -> None:
        self.conducted, self.search, self.observer, self.ask = conducted, search, observer, ask

    async def run(self) -> None:
        async with asyncio.timeout(60):
            await self.search.run(rounds_of(self.search.settings))
        self.observer.finished = True
        await self.observer.look()

    async def searched(self, evaluator: Evaluator = unevenness) -> None:
        """Run to the end with an instant worker."""
        async with evaluating(self.conducted.redis, self.conducted.keys, evaluator):
            await self.run()


@asynccontextmanager
async def observed(redis: Redis, keys: Keys, folder: Path) -> AsyncIterator[Observed]:
    """Return a search that has not begun, as Launch would build it, with a living worker."""
    conducted = Conducted(redis, keys, folder)
    search = await conducted.open()
    await redis.set(keys.profile, PROFILE.model_dump_json())
    await JobQueue(redis, keys, "w1", lease_seconds=60).beat(None, json.dumps({"stage": "idle"}))
    observer = Observer(redis, keys, SPEC, folder)
    observer.begin(History())
    observer.search, observer.chat = search, QuietChat()
    observer.counters = {"seconds": 3.0, "prompt_tokens": 900.0, "completion_tokens": 80.0}
    await observer.look()
    looking = asyncio.create_task(observer.run())
    async with served(observer) as ask:
        try:
            yield Observed(conducted, search, observer, ask)
        finally:
            looking.cancel()
            conducted.journal.close()


def every_third_fails(candidate: Candidate) -> Measured | Failed:
    return Failed(reason="timeout") if int(candidate.id, 16) % 3 == 0 else unevenness(candidate)
