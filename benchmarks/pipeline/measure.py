"""The same pipeline, measured: a whole search of the daemon on a real server, with scripted answers and evaluations."""

import asyncio
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from agents.llm.endpoint import Answer, Question
from benchmarks.pipeline.case import Case, varied
from daemon.search.in_flight import InFlight
from daemon.search.modes import rounds_of
from daemon.settings.search import SearchSettings
from protocol.queue.connection import connect
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from tests.support.conducted import Conducted, unevenness
from tests.support.schema_answers import SchemaChat
from tests.support.servers import server_binary, temporary_server


class SlowChat(SchemaChat):
    """Answers after a while, some questions at once."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.proposals = 0
        self._seconds, self._rng, self._slots = case.answer, Random(0), asyncio.Semaphore(case.at_once)

    async def ask(self, question: Question) -> Answer:
        """Answer as the question's schema says."""
        self.proposals += not question.label.startswith("selector")
        async with self._slots:
            await asyncio.sleep(varied(self._seconds, self._rng))
        return await super().ask(question)


class Workers:
    """Workers that sleep instead of measuring; `measuring` is for how long."""

    def __init__(self, url: str, case: Case, keys: Keys) -> None:
        self._url, self._case, self._keys, self._rng = url, case, keys, Random(1)
        self.measuring = 0.0

    async def work(self, number: int) -> None:
        """Measure until cancelled."""
        jobs = JobQueue(connect(self._url), self._keys, f"w{number}", lease_seconds=600)
        while True:
            if job := await jobs.claim():
                seconds = varied(self._case.evaluation, self._rng)
                await asyncio.sleep(seconds)
                self.measuring += seconds
                outcome = unevenness(job.candidate).model_copy(update={"seconds": seconds})
                await jobs.commit(job, outcome)


@dataclass(frozen=True)
class Measured:
    """What a whole search took."""

    seconds: float
    measuring: float
    """Seconds in which the workers measured, summed."""
    proposals: int
    """Answers with a proposal, also those that were refused."""


def measure(case: Case) -> Measured:
    """Run the search."""
    binary = server_binary("valkey")
    assert binary is not None
    with temporary_server(binary) as server, tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_search(case, server.url, Path(folder)))


async def _search(case: Case, url: str, folder: Path) -> Measured:
    keys = Keys("pipeline")
    settings = SearchSettings.model_validate(
        {
            "name": keys.search,
            "population": case.population,
            "mutations": case.offspring // 2,
            "crossovers": case.offspring - case.offspring // 2,
            "rounds": 10_000,
            "max_evaluations": case.candidates,
            "mode": case.mode,
        }
    )
    chat = SlowChat(case)
    conducted = Conducted(connect(url), keys, folder, settings=settings, chat=chat)
    search = await conducted.open()
    search.in_flight = InFlight(None, search.state.population, partial(_count, case), case.at_once)
    workers = Workers(url, case, keys)
    working = [asyncio.create_task(workers.work(number)) for number in range(case.workers)]
    began = time.perf_counter()
    await search.run(rounds_of(search.settings))
    seconds = time.perf_counter() - began
    for task in working:
        task.cancel()
    await asyncio.wait(working)
    conducted.journal.close()
    return Measured(seconds, workers.measuring, chat.proposals)


async def _count(case: Case) -> int:
    return case.workers
