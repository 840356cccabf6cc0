"""Status: how far a search is, in one form for the command line, the HTTP API and the folder of a search that ended.

What is seen of a search comes from two sides: its history (the ledger and the outcomes, which only grow), and what is
around it in Redis (the command, the daemon, the workers, the queue).
"""

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from agents.llm.endpoint import Degraded
from agents.population.population import Evaluation, Population
from protocol.plans.candidate import Candidate, Failed, Measured, Source
from protocol.plans.spec import Measure, SearchSpec
from protocol.queue.connection import is_missing_group
from protocol.queue.control import Command, Control
from protocol.queue.keys import GROUP, Keys
from protocol.queue.worker_status import WorkerStatus, read_dead, read_workers


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class EndpointStatus(_Value):
    """An LLM endpoint as the daemon has met it since it started; `requests` counts HTTP requests, retries included."""

    state: Literal["asked", "left alone"]
    reason: str | None = None
    """Why it is not asked."""
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int


class Condition(_Value):
    """What only the daemon knows. None: no daemon has said it yet."""

    degraded: bool | None = None
    """Whether classical operators stand in for the LLM."""
    degraded_by: Degraded | None = None
    """Why: no LLM endpoint answers (`endpoints`), or the LLM's budget is used up (`budget`)."""
    parents_source: Source | None = None
    """Who chose the parents of the last round: the LLM, or the fallback."""
    endpoints: dict[str, EndpointStatus] = {}
    finished: bool = False
    """Whether the rounds or the budget are used up."""


class QueueDepth(_Value):
    """Candidates on the job stream: `queued` ones wait for a worker, `running` ones have been claimed."""

    queued: int = 0
    running: int = 0


class Status(_Value):
    """How far a search is. Figures are None while nothing was measured."""

    search: str
    model: str
    rate: float
    fitness: Measure
    redis: Literal["answers", "away"] = "answers"
    """Away: what stands here is from before."""
    control: Command
    daemon: str | None
    workers: tuple[WorkerStatus, ...]
    queue: QueueDepth
    finished: bool
    degraded: bool | None
    degraded_by: Degraded | None = None
    endpoints: dict[str, EndpointStatus]
    parents_source: Source | None
    round: int
    candidates: int
    """Proposed so far; baselines are not counted."""
    by_source: dict[str, int]
    """The candidates that the LLM made, and those of the classical operators that stand in for it."""
    measured: int
    """Of the proposed ones."""
    failed: int
    """Of the proposed ones."""
    stopped: int = 0
    """Of the proposed ones: measured in part, for they lost their race."""
    waiting: int
    """Issued, baselines included, and still without an outcome."""
    dead: tuple[dict[str, str], ...] = ()
    """The last jobs that were given up, newest first: `id`, `reason`, `worker`, `detail`."""
    dense_perplexity: float | None
    best: str | None
    """The best candidate's id."""
    best_perplexity: float | None
    best_kl: float | None
    tokens: dict[str, int]
    """Used by the LLM over all restarts: `prompt` and `completion`."""
    cost: float = 0.0
    """Of them, at the prices of the endpoints; over all restarts."""
    seconds: float


@dataclass(frozen=True)
class Around:
    """What stands in Redis beside the history."""

    control: Command
    daemon: str | None
    workers: tuple[WorkerStatus, ...]
    queue: QueueDepth
    dead: tuple[dict[str, str], ...] = ()


class AroundReader:
    """Reads what is around a search; raises what the Redis client raises while the server is away."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._control = Control(redis, keys)

    async def read(self, seconds: float = 2.0) -> Around:
        """What is there now; TimeoutError when it cannot be had in so many seconds."""
        async with asyncio.timeout(seconds):
            # Asked first, for Control waits for a server that is away, and logs that it does.
            daemon = await self._redis.get(self._keys.daemon)
            found = await read_workers(self._redis, self._keys)
            return Around(
                control=await self._control.read(),
                daemon=daemon,
                workers=tuple(sorted(found.workers, key=lambda worker: worker.consumer)),
                queue=await self._queue(),
                dead=tuple(await read_dead(self._redis, self._keys)),
            )

    async def _queue(self) -> QueueDepth:
        on_stream = int(await self._redis.xlen(self._keys.jobs))
        try:
            claimed = int((await self._redis.xpending(self._keys.jobs, GROUP))["pending"])
        except ResponseError as error:
            if not is_missing_group(error):
                raise
            claimed = 0  # no worker has come yet
        return QueueDepth(queued=max(0, on_stream - claimed), running=claimed)


@dataclass(frozen=True)
class Seen:
    """A search as it is at one moment."""

    search: str
    spec: SearchSpec
    ledger: dict[str, Candidate]
    population: Population
    counters: Mapping[str, float]
    dense_perplexity: float | None
    around: Around
    condition: Condition


@dataclass
class Tally:
    """Counts over a history, which only grows: each look costs as much as what is new."""

    by_source: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By source and kind; baselines are counted under `baseline`."""
    round: int = 0
    evaluation_seconds: float = 0.0
    _issued: int = 0
    _evaluated: int = 0
    _best: float = float("inf")

    def take(self, ledger: dict[str, Candidate], population: Population) -> list[tuple[Evaluation, bool]]:
        """Count what is new; returns the new evaluations, each with whether it was the best so far."""
        for candidate in islice(reversed(ledger.values()), len(ledger) - self._issued):
            self.round = max(self.round, candidate.provenance.round)
            self.by_source[_source(candidate)] += 1
        self._issued = len(ledger)
        return [(new, self._take(new)) for new in population.newest(population.outcomes - self._evaluated)]

    def _take(self, evaluation: Evaluation) -> bool:
        self._evaluated += 1
        outcome, candidate = evaluation.outcome, evaluation.candidate
        self.outcomes[_source(candidate), outcome.kind] += 1
        self.evaluation_seconds += 0.0 if isinstance(outcome, Failed) else outcome.seconds
        if not isinstance(outcome, Measured):
            return False
        is_best = candidate.is_proposal and outcome.fitness < self._best
        self._best = outcome.fitness if is_best else self._best
        return is_best


def _source(candidate: Candidate) -> str:
    return candidate.provenance.source if candidate.is_proposal else "baseline"


def make_status(seen: Seen, tally: Tally) -> Status:
    """The status of a search; `tally` has taken what is seen."""
    best = seen.population.best()
    outcome = best.outcome if best and isinstance(best.outcome, Measured) else None
    proposals = {source: count for source, count in tally.by_source.items() if source != "baseline"}
    return Status(
        search=seen.search,
        model=seen.spec.model,
        rate=seen.spec.rate,
        fitness=seen.spec.measure,
        control=seen.around.control,
        daemon=seen.around.daemon,
        workers=seen.around.workers,
        queue=seen.around.queue,
        **dict(seen.condition),
        round=tally.round,
        candidates=sum(proposals.values()),
        by_source={"llm": 0, "fallback": 0, **proposals},
        measured=len(seen.population),
        failed=sum(tally.outcomes[source, "failed"] for source in proposals),
        stopped=sum(tally.outcomes[source, "stopped"] for source in proposals),
        waiting=len(seen.ledger) - sum(tally.outcomes.values()),
        dead=seen.around.dead,
        dense_perplexity=seen.dense_perplexity,
        best=best.candidate.id if best else None,
        best_perplexity=outcome.perplexity if outcome else None,
        best_kl=outcome.kl if outcome else None,
        tokens={name: int(seen.counters.get(f"{name}_tokens", 0)) for name in ("prompt", "completion")},
        cost=round(seen.counters.get("cost", 0.0), 6),
        seconds=round(seen.counters.get("seconds", 0.0), 1),
    )
