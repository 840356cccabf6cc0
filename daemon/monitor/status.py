"""The status of a search, in one form for the command line, the HTTP API and the folder of a search that ended.

It is made from two sources: the history (the ledger and the outcomes, which only grow), and the runtime state in Redis
(the command, the daemon, the workers, the queue).
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

from agents.llm.endpoint import Awaited, Degraded
from agents.population.population import Evaluation, Population
from daemon.monitor.glance import Glance
from daemon.search.figures import Figures, figures_of, uniform_outcome
from protocol.plans.candidate import Candidate, Failed, Measured, Source
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import Measure, SearchSpec
from protocol.queue.connection import is_missing_group
from protocol.queue.control import Command, Control
from protocol.queue.keys import GROUP, Keys
from protocol.queue.worker_status import WorkerStatus, read_dead, read_workers


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class EndpointStatus(_Value):
    """An LLM endpoint, with totals since the daemon started. `requests` counts HTTP requests, including retries."""

    state: Literal["asked", "left alone"]
    reason: str | None = None
    """Why the endpoint gets no questions now."""
    requests: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    answer_seconds: float | None = None
    """Mean time that an answer took, with its retries."""
    cost: float = 0.0
    """Cost of the tokens at the endpoint's prices."""

    @property
    def shown_state(self) -> str:
        """The state in words for people."""
        return "in use" if self.state == "asked" else "resting"


class QuestionCounts(_Value):
    """The questions that one agent asked the LLM since the daemon started."""

    asked: int = 0
    asked_again: int = 0
    """How often a question was repeated, because its answer could not be used. Not in `asked`."""
    unanswered: int = 0
    """How often no endpoint answered."""


class Condition(_Value):
    """Facts that only the daemon knows. They are None before a daemon has published them."""

    degraded: bool | None = None
    """Whether operators without an LLM propose in its place."""
    degraded_by: Degraded | None = None
    """Why they replace the LLM: no endpoint answers (`endpoints`), or the LLM budget is used up (`budget`)."""
    awaited: Awaited | None = None
    """The endpoints that questions wait for at the start."""
    parents_source: Source | None = None
    """Whether the LLM or the fallback chose the parents of the last round."""
    endpoints: dict[str, EndpointStatus] = {}
    questions: dict[str, QuestionCounts] = {}
    """The questions of each agent by its name."""
    finished: bool = False
    """Whether all rounds are done or the budget is used up."""


class QueueDepth(_Value):
    """Candidates on the job stream: `queued` ones wait for a worker, `running` ones are claimed."""

    queued: int = 0
    running: int = 0


class Status(_Value):
    """The progress of a search. Figures are None until they have been measured."""

    search: str
    model: str
    rate: float
    fitness: Measure
    redis: Literal["answers", "away"] = "answers"
    """`away` means that Redis does not answer, and that this is the last known status."""
    control: Command
    daemon: str | None
    workers: tuple[WorkerStatus, ...]
    queue: QueueDepth
    finished: bool
    degraded: bool | None
    degraded_by: Degraded | None = None
    awaited: Awaited | None = None
    """The endpoints that questions wait for at the start; candidates that need no LLM are measured meanwhile."""
    endpoints: dict[str, EndpointStatus]
    questions: dict[str, QuestionCounts] = {}
    parents_source: Source | None
    round: int
    candidates: int
    """Number of proposed candidates, without baselines."""
    by_source: dict[str, int]
    """Candidates by what proposed them: the LLM, or operators without an LLM."""
    measured: int
    """Proposed candidates that were measured."""
    failed: int
    """Proposed candidates that failed."""
    stopped: int = 0
    """Proposed candidates that were measured in part, because they lost their race."""
    waiting: int
    """Issued candidates without an outcome, including baselines."""
    dead: tuple[dict[str, str], ...] = ()
    """The last failed jobs on the dead-letter stream, newest first: `id`, `reason`, `worker`, `detail`."""
    dense_perplexity: float | None
    best: str | None
    """The best candidate's id."""
    best_perplexity: float | None
    best_kl: float | None
    uniform_perplexity: float | None = None
    """Uniform pruning with the search's reconstruction, the baseline."""
    uniform_kl: float | None = None
    best_to_uniform: float | None = None
    """The best candidate's fitness divided by that of uniform pruning: below 1, the search has gained something."""
    glance: Glance | None = None
    """What terminals draw: the best fitness against evaluations, and the best rates beside the sensitivities."""
    tokens: dict[str, int]
    """LLM tokens, summed over restarts: `prompt` and `completion`."""
    cost: float = 0.0
    """Cost of the tokens at the endpoints' prices, summed over restarts."""
    seconds: float

    @property
    def preparing(self) -> WorkerStatus | None:
        """A worker that prepares the model, if none is ready to measure; otherwise None."""
        usable = [worker for worker in self.workers if worker.stage != "unusable"]
        is_ready = any(worker.is_ready for worker in usable)
        return usable[0] if usable and not is_ready else None

    @property
    def figures(self) -> Figures:
        """The minimised figure of the best candidate, of uniform pruning and of the dense model."""
        if self.fitness == "kl":
            return Figures("kl", self.best_kl, self.uniform_kl, 0.0)
        return Figures("perplexity", self.best_perplexity, self.uniform_perplexity, self.dense_perplexity)


@dataclass(frozen=True)
class RuntimeState:
    """The state in Redis besides the history."""

    control: Command
    daemon: str | None
    workers: tuple[WorkerStatus, ...]
    queue: QueueDepth
    dead: tuple[dict[str, str], ...] = ()


class RuntimeStateReader:
    """Reads the runtime state of a search. Raises the Redis client's errors while the server is unreachable."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._control = Control(redis, keys)

    async def read(self, seconds: float = 2.0) -> RuntimeState:
        """Return the current state. Raises TimeoutError after `seconds`."""
        async with asyncio.timeout(seconds):
            # This read comes first: it raises if the server is unreachable, whereas Control would log that and wait.
            daemon = await self._redis.get(self._keys.daemon)
            found = await read_workers(self._redis, self._keys)
            return RuntimeState(
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
            claimed = 0  # no worker has started yet
        return QueueDepth(queued=max(0, on_stream - claimed), running=claimed)


@dataclass(frozen=True)
class Observation:
    """Everything known about a search at one moment."""

    search: str
    spec: SearchSpec
    ledger: dict[str, Candidate]
    population: Population
    counters: Mapping[str, float]
    profile: ModelProfile | None
    runtime: RuntimeState
    condition: Condition


@dataclass
class Tally:
    """Counts over a history. An update reads only the new entries, because a history only grows."""

    by_source: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Outcomes by source and kind, with the source `baseline` for baselines."""
    round: int = 0
    evaluation_seconds: float = 0.0
    evaluations: int = 0
    """Proposals with an outcome."""
    improvements: list[tuple[int, float]] = field(default_factory=list)
    """For each new best, the number of evaluations until then, and its fitness."""
    _issued: int = 0
    _evaluated: int = 0

    def take(self, ledger: dict[str, Candidate], population: Population) -> list[tuple[Evaluation, bool]]:
        """Count new candidates and outcomes. Returns the new evaluations, each with True if it was the best so far."""
        for candidate in islice(reversed(ledger.values()), len(ledger) - self._issued):
            self.round = max(self.round, candidate.provenance.round)
            self.by_source[_source(candidate)] += 1
        self._issued = len(ledger)
        return [(new, self._take(new)) for new in population.newest(population.outcomes - self._evaluated)]

    def _take(self, evaluation: Evaluation) -> bool:
        outcome, candidate = evaluation.outcome, evaluation.candidate
        self._evaluated += 1
        self.evaluations += candidate.is_proposal
        self.outcomes[_source(candidate), outcome.kind] += 1
        self.evaluation_seconds += 0.0 if isinstance(outcome, Failed) else outcome.seconds
        if not isinstance(outcome, Measured) or not candidate.is_proposal:
            return False
        is_best = not self.improvements or outcome.fitness < self.improvements[-1][1]
        if is_best:
            self.improvements.append((self.evaluations, outcome.fitness))
        return is_best


def _source(candidate: Candidate) -> str:
    return candidate.provenance.source if candidate.is_proposal else "baseline"


def llm_tokens(counters: Mapping[str, float]) -> dict[str, int]:
    """Return the LLM tokens in the counters of a search: `prompt` and `completion`."""
    return {name: int(counters.get(f"{name}_tokens", 0)) for name in ("prompt", "completion")}


def make_status(observation: Observation, tally: Tally) -> Status:
    """Return the status of a search. `tally` must already have counted the observation's history."""
    best = observation.population.best()
    outcome = best.outcome if best and isinstance(best.outcome, Measured) else None
    proposals = {source: count for source, count in tally.by_source.items() if source != "baseline"}
    spec, profile, population = observation.spec, observation.profile, observation.population
    uniform = uniform_outcome(spec, profile, population) if profile else None
    ratio = figures_of(spec, profile, population).ratio if profile else None
    glance = Glance.of(spec, profile, population, tally.evaluations, tally.improvements) if profile else None
    return Status(
        search=observation.search,
        model=observation.spec.model,
        rate=observation.spec.rate,
        fitness=observation.spec.measure,
        control=observation.runtime.control,
        daemon=observation.runtime.daemon,
        workers=observation.runtime.workers,
        queue=observation.runtime.queue,
        **dict(observation.condition),
        round=tally.round,
        candidates=sum(proposals.values()),
        by_source={"llm": 0, "fallback": 0, **proposals},
        measured=len(observation.population),
        failed=sum(tally.outcomes[source, "failed"] for source in proposals),
        stopped=sum(tally.outcomes[source, "stopped"] for source in proposals),
        waiting=len(observation.ledger) - sum(tally.outcomes.values()),
        dead=observation.runtime.dead,
        dense_perplexity=profile.dense.perplexity if profile else None,
        best=best.candidate.id if best else None,
        best_perplexity=outcome.perplexity if outcome else None,
        best_kl=outcome.kl if outcome else None,
        uniform_perplexity=uniform.perplexity if uniform else None,
        uniform_kl=uniform.kl if uniform else None,
        best_to_uniform=ratio,
        glance=glance,
        tokens=llm_tokens(observation.counters),
        cost=round(observation.counters.get("cost", 0.0), 6),
        seconds=round(observation.counters.get("seconds", 0.0), 1),
    )
