"""A whole search with a real server, a scripted LLM and an instant evaluator, as one process runs it."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from agents.llm.endpoint import ChatClient
from agents.prompting.settings import ReplyFormat
from daemon.search.make_agents import make_agents
from daemon.search.modes import rounds_of
from daemon.search.search import Search
from daemon.search.state import SearchState
from daemon.settings.llm import LlmSettings
from daemon.settings.search import SearchSettings
from daemon.state.journal import Journal
from daemon.state.store import SearchStore
from protocol.plans.candidate import Candidate, Measured, Outcome
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from tests.support.samples import PROFILE, SPEC, measured
from tests.support.schema_answers import SchemaChat

SETTINGS = SearchSettings(name="test", population=5, mutations=3, crossovers=2, rounds=2)
Evaluator = Callable[[Candidate], Outcome]


def unevenness(candidate: Candidate) -> Measured:
    """A perplexity that likes the first layers whole."""
    kept = [layer.mlp_channels for layer in candidate.plan.layers]
    return measured(10 + sum((i + 1) * channels for i, channels in enumerate(kept)) / 64, candidate)


@asynccontextmanager
async def evaluating(redis: Redis, keys: Keys, evaluator: Evaluator = unevenness) -> AsyncIterator[Counter[str]]:
    """An instant worker; counts what it evaluated."""
    evaluated: Counter[str] = Counter()
    jobs = JobQueue(redis, keys, "instant", lease_seconds=30)

    async def work() -> None:
        while True:
            if job := await jobs.claim():
                evaluated[job.candidate.id] += 1
                await jobs.commit(job, evaluator(job.candidate))

    task = asyncio.create_task(work())
    try:
        yield evaluated
    finally:
        task.cancel()
        await asyncio.wait({task})


class Conducted:
    """A search as one process runs it; a second one on the same server goes on from the first."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        folder: Path,
        *,
        spec: SearchSpec = SPEC,
        settings: SearchSettings = SETTINGS,
        profile: ModelProfile = PROFILE,
        chat: ChatClient | None = None,
        proposals_per_call: int | None = None,
        reply: ReplyFormat = "edits",
    ) -> None:
        self.proposals_per_call, self.reply = proposals_per_call, reply
        self.profile = profile.model_copy(update={"dense_report": profile.dense if spec.report else None})
        self.redis, self.keys, self.folder, self.spec, self.settings = redis, keys, folder, spec, settings
        self.chat = chat or SchemaChat()

    async def open(self) -> Search:
        store = SearchStore(self.redis, self.keys, self.spec)
        queue = await store.take_charge(previous_is_dead=True)
        history = await store.history()
        await store.repair(queue, history)
        llm = LlmSettings(reply=self.reply, max_tokens=500, proposals_per_call=self.proposals_per_call)
        agents = make_agents(self.settings, llm, self.chat)
        self.journal = Journal(self.folder)
        return Search(self.settings, SearchState.of(self.spec, self.profile, history), agents, queue, self.journal)

    async def run(self, seconds: float = 60) -> Search:
        search = await self.open()
        try:
            async with asyncio.timeout(seconds):
                await search.run(rounds_of(search.settings))
        finally:
            self.journal.close()
        return search

    async def searched(self, evaluator: Evaluator = unevenness) -> Search:
        """Run to the end with an instant worker."""
        async with evaluating(self.redis, self.keys, evaluator):
            return await self.run()


async def _killed_at(search: Search, enough: int, look_after: float) -> bool:
    """Run until the ledger has `enough` candidates, then end it there; whether it was still running."""
    running = asyncio.create_task(search.run(rounds_of(search.settings)))
    async with asyncio.timeout(60):
        while not running.done() and len(search.state.ledger) < enough:
            await asyncio.sleep(look_after)
    killed = not running.done()
    running.cancel()
    await asyncio.wait({running})
    return killed


async def killed_until_it_ends(
    make: Callable[[], Conducted], *, look_after: float = 0
) -> tuple[Search, Counter[str], int]:
    """Kill a search after one to three more candidates, start it again, and so on; its end, evaluations and kills."""
    evaluated: Counter[str] = Counter()
    for kills in range(100):
        conducted = make()
        search = await conducted.open()
        enough = len(search.state.ledger) + 1 + (kills + 1) % 3
        async with evaluating(conducted.redis, conducted.keys) as counted:
            killed = await _killed_at(search, enough, look_after)
        conducted.journal.close()
        evaluated += counted
        if not killed:
            return search, evaluated, kills
    raise AssertionError("the search makes no progress")


Conduct = Callable[..., Conducted]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
