"""The worker of compare_search.py, and the results that it keeps of each search."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from daemon.monitor.summary import Summary
from daemon.settings.settings import Settings
from daemon.state.history import History
from daemon.state.recovery import recovered
from gpu_worker.evaluation.outcomes import answer
from gpu_worker.evaluation.session import Session
from gpu_worker.evaluation.target import Target
from gpu_worker.measuring.half_precision import products_in_float32
from gpu_worker.measuring.perplexity import checked_perplexity
from gpu_worker.progress import no_progress
from gpu_worker.pruning.importance import any_heads_plan
from protocol.errors import SelfPrunerError, first_error
from protocol.plans.candidate import OUTCOME, Candidate, Failed, Measured, Outcome
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import UNREACHABLE_ERRORS, connect
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from protocol.queue.profile_board import ProfileBoard
from protocol.runtime.files import AppendOnlyFile, write_atomically

LEASE_SECONDS = 600.0
RESULT = "result.json"
"""File in the folder of a finished search: its result and its arguments."""
REFUSED = re.compile(r"(Proposal|Configuration) \d+: ")
"""How a reason in the log begins if an item of a reply was parsed and then refused."""
FIGURES = TypeAdapter(dict[str, float])


class BestSoFar(BaseModel):
    """The numbers of evaluations and of measured tokens at which the best fitness improved, and its new values."""

    evaluations: list[int] = []
    tokens: list[int] = []
    fitness: list[float] = []
    """Perplexity, or divergence if that was minimised."""

    def take(self, fitness: float, evaluations: int, tokens: int) -> None:
        """Add an outcome. `evaluations` are computed from `tokens`, because races measure candidates in part."""
        if not self.fitness or fitness < self.fitness[-1]:
            self.fitness.append(fitness)
            self.evaluations.append(evaluations)
            self.tokens.append(tokens)


class SearchResult(BaseModel):
    """The result of one search."""

    method: str
    granularity: str
    rate: float
    seed: int
    budget: int
    """Measured tokens of all candidates, as a number of whole evaluations (rounded up)."""
    tokens: int
    """Measured tokens of all candidates together."""
    candidates: int
    """Distinct plans that were measured, whole or in part."""
    best_so_far: BestSoFar
    report: float
    """Perplexity of the best candidate on the report text."""
    uniform: float
    """The fitness of uniform rates."""
    uniform_report: float
    plain_report: float
    """Perplexity of uniform rates on the report text, with rectangular heads and without reconstruction."""
    any_heads_report: float
    """Like `plain_report`, but with any query heads removed (masked)."""
    dense_report: float
    rates: list[float]
    """Rates of the best candidate."""
    by_llm: int
    """Candidates that the LLM made."""
    asked: int
    """Replies of the LLM."""
    readable: int
    """Replies with at least one proposal (or choice of parents) that could be parsed. Some are refused, mostly because
    their plan was known."""
    accepted: int
    """Replies with at least one proposal that entered the queue, or whose choice of parents was used."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    busy: float
    """Share of the seconds in which the worker measured."""


class Comparison(BaseModel):
    """The contents of comparison.json."""

    arguments: dict[str, Any]
    results: list[SearchResult]


class MeasuringWorker:
    """A worker in this process. It keeps its model between searches, and every outcome by candidate id."""

    def __init__(self, redis_url: str, kept: Path) -> None:
        self._url, self._kept = redis_url, kept
        self._session: Session | None = None
        self._outcomes: dict[str, Outcome] = {}
        self.measured_by: dict[str, str] = {}
        """The search that each candidate was measured for."""
        for record in _lines(kept):
            self._outcomes[record["id"]] = OUTCOME.validate_python(record["outcome"])
            self.measured_by[record["id"]] = record["search"]

    @asynccontextmanager
    async def serving(self, settings: Settings) -> AsyncIterator[None]:
        """Measure for the search that runs in the block. If measuring fails, the block is cancelled.

        Raise SelfPrunerError for errors of the disk, the server or the device.
        """
        session = await asyncio.to_thread(self._session_for, settings.spec())
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(self._serve(settings.search.name, session))
                yield
                task.cancel()
        except BaseExceptionGroup as errors:
            raise first_error(errors) or errors.exceptions[0] from None

    @products_in_float32()
    def _session_for(self, spec: SearchSpec) -> Session:
        """Return the session of a spec; searches of one rate and seed share it."""
        if self._session is None or self._session.spec != spec:
            self._session = Session(spec)
        return self._session

    async def _serve(self, search: str, session: Session) -> None:
        redis, keys = connect(self._url), Keys(search)
        try:
            profiles = ProfileBoard(redis, keys)
            while await profiles.publish(session.profile) is None:  # noqa: ASYNC110  (the search has not published its spec)
                await asyncio.sleep(0.1)
            jobs = JobQueue(redis, keys, "benchmark", lease_seconds=LEASE_SECONDS)
            while True:
                if job := await jobs.claim():
                    await jobs.commit(job, await self._outcome(job.candidate, session, search))
        except (OSError, RuntimeError, *UNREACHABLE_ERRORS) as error:
            raise SelfPrunerError(
                f"measuring for {search} failed: {error}; run the same command again to resume"
            ) from error
        finally:
            await redis.aclose()

    async def _outcome(self, candidate: Candidate, session: Session, search: str) -> Outcome:
        """Return the stored outcome if there is one. Races are always measured, because their rivals differ."""
        if candidate.race or candidate.id not in self._outcomes:
            request = candidate.model_dump(include={"plan", "text", "race"})
            outcome = await asyncio.to_thread(products_in_float32()(answer), session, request)
            if candidate.race:
                return outcome
            self._keep(candidate.id, outcome, search)
        return self._outcomes[candidate.id]

    def _keep(self, id_: str, outcome: Outcome, search: str) -> None:
        self._outcomes[id_], self.measured_by[id_] = outcome, search
        record = {"id": id_, "search": search, "outcome": outcome.model_dump(mode="json")}
        with closing(AppendOnlyFile(self._kept)) as lines:
            lines.append(json.dumps(record) + "\n")


@dataclass(frozen=True)
class PlainUniform:
    """Perplexities on the report text of uniform rates without reconstruction."""

    rectangular: float
    any_heads: float
    """With any query heads removed (masked) and the same number of parameters. Fairer for models with few KV heads."""


@products_in_float32()
def plain_uniform(specs: Sequence[SearchSpec], kept: Path) -> list[PlainUniform]:
    """Return the perplexities of uniform rates without reconstruction for each spec, stored in the file `kept`.

    The specs must differ in their pruning rate only.
    """
    plain = [spec.model_copy(update={"reconstruction": "none"}) for spec in specs]
    found = _figures(kept)
    missing = [spec for spec in plain if not {spec.fingerprint, _any_heads(spec)} <= found.keys()]
    if missing:
        target = Target(missing[0])
        assert target.texts.report is not None
        for spec in missing:
            rates = [spec.rate] * len(target.shape.layers)
            masked = any_heads_plan(rates, target.importance, target.shape, multiple_of=spec.multiple_of)
            for key, plan in ((spec.fingerprint, spec.uniform_plan(target.shape)), (_any_heads(spec), masked)):
                target.prune(plan)
                found[key], _ = checked_perplexity(target.model.decoder, target.texts.report, no_progress, "measuring")
        write_atomically(kept, json.dumps(found, indent=1) + "\n")
    return [PlainUniform(found[spec.fingerprint], found[_any_heads(spec)]) for spec in plain]


def _any_heads(spec: SearchSpec) -> str:
    """Return the key of the figure with any heads."""
    return f"{spec.fingerprint}, any heads"


def _figures(kept: Path) -> dict[str, float]:
    """Read perplexities by the fingerprint of their spec; empty if the file is missing or damaged."""
    try:
        return FIGURES.validate_json(kept.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def result_of(
    settings: Settings, method: str, summary: Summary, plain: PlainUniform, measured_by: Mapping[str, str]
) -> SearchResult:
    """Return the result of a finished search, read from its folder; `measured_by` is the worker's."""
    best, figures, measure = summary.best, BestSoFar(), settings.search.fitness
    assert best is not None and best.report_perplexity is not None
    uniform = summary.uniform.kl if measure == "kl" else summary.uniform.perplexity
    history = recovered(settings.folder, settings.spec(), History()) or History()
    tokens, whole, busy = 0, summary.uniform.tokens or 1, 0.0
    name = settings.search.name
    for evaluation in history.population:
        candidate, outcome = evaluation.candidate, evaluation.outcome
        if isinstance(outcome, Failed):
            continue
        busy += outcome.seconds if measured_by.get(candidate.id, name) == name else 0.0
        tokens += outcome.tokens if candidate.is_proposal else 0
        if isinstance(outcome, Measured) and candidate.is_proposal:
            figures.take(outcome.fitness, -(-tokens // whole), tokens)
    replies = [line for line in _lines(settings.folder / "log.jsonl") if line["event"] == "llm_reply"]
    return SearchResult(
        method=method,
        granularity=settings.search.granularity,
        rate=settings.target.rate,
        seed=settings.search.seed,
        budget=-(-tokens // whole),
        tokens=tokens,
        candidates=sum(candidate.is_proposal for candidate in history.ledger.values()),
        best_so_far=figures,
        report=best.report_perplexity,
        uniform=float("nan") if uniform is None else uniform,
        uniform_report=summary.uniform.report_perplexity or float("nan"),
        plain_report=plain.rectangular,
        any_heads_report=plain.any_heads,
        dense_report=summary.dense.report_perplexity or float("nan"),
        rates=list(summary.rates),
        by_llm=summary.candidates["by_source"]["llm"],
        asked=len(replies),
        readable=sum(r["accepted"] > 0 or REFUSED.match(r["reason"] or "") is not None for r in replies),
        accepted=sum(r["accepted"] > 0 for r in replies),
        prompt_tokens=summary.tokens["prompt"],
        completion_tokens=summary.tokens["completion"],
        seconds=summary.seconds,
        busy=busy / summary.seconds,
    )


def keep_result(result: SearchResult, folder: Path, arguments: Mapping[str, Any]) -> None:
    """Write the result of a search to its folder."""
    record = {"arguments": arguments, "result": result.model_dump()}
    write_atomically(folder / RESULT, json.dumps(record, indent=1) + "\n")


def result_before(folder: Path) -> SearchResult | None:
    """Return the result that an earlier call wrote to `folder`; None if there is none or it is damaged."""
    try:
        return SearchResult.model_validate(json.loads((folder / RESULT).read_bytes())["result"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _lines(file: Path) -> list[dict[str, Any]]:
    """Read the records of a JSONL file; skip lines that a kill left incomplete."""
    found = []
    for line in file.read_bytes().splitlines() if file.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]
