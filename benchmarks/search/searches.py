"""What benchmarks/search/compare_search.py measures with, and what it keeps of a search."""

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
from gpu_worker.evaluation.outcomes import answer
from gpu_worker.evaluation.session import Session
from gpu_worker.evaluation.target import Target
from gpu_worker.measuring.half_precision import products_in_float32
from gpu_worker.measuring.perplexity import checked_perplexity
from gpu_worker.progress import no_progress
from gpu_worker.pruning.importance import any_heads_plan
from protocol.errors import SelfPrunerError, first_error
from protocol.plans.candidate import OUTCOME, Candidate, Outcome
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import AWAY, connect
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from protocol.queue.profile_board import ProfileBoard
from protocol.runtime.files import Lines, replace

LEASE_SECONDS = 600.0
RESULT = "result.json"
"""In the folder of a search that has ended: what is kept of it, and the arguments that it was made by."""
REFUSED = re.compile(r"(Proposal|Configuration) \d+: ")
"""How the log's reason begins where an item of a reply was read, and then refused."""
FIGURES = TypeAdapter(dict[str, float])


class BestSoFar(BaseModel):
    """The best fitness after so many evaluations, and tokens that were measured for them; where it fell."""

    evaluations: list[int] = []
    tokens: list[int] = []
    fitness: list[float] = []
    """Perplexity, or the divergence where that was minimised."""

    def take(self, fitness: float, evaluations: int, tokens: int) -> None:
        """One more evaluation; `evaluations` are what `tokens` are worth, for racing does not measure all of each."""
        if not self.fitness or fitness < self.fitness[-1]:
            self.fitness.append(fitness)
            self.evaluations.append(evaluations)
            self.tokens.append(tokens)


class SearchResult(BaseModel):
    """One search."""

    method: str
    granularity: str
    rate: float
    seed: int
    budget: int
    """Whole evaluations that the tokens of all candidates are worth."""
    tokens: int
    """Of all candidates together."""
    candidates: int
    """Different plans that were measured, whole or in part."""
    best_so_far: BestSoFar
    report: float
    """The best one's perplexity on the report text."""
    uniform: float
    """The fitness of uniform rates."""
    uniform_report: float
    plain_report: float
    """The same of uniform rates with rectangular heads and nothing reconstructed."""
    any_heads_report: float
    """The same where any query heads may go (masked)."""
    dense_report: float
    rates: list[float]
    """The best one's."""
    by_llm: int
    """Candidates that the LLM made."""
    asked: int
    """Replies of the LLM."""
    readable: int
    """Of these, replies of which a proposal (or a choice of parents) could be read, be it accepted or refused, mostly
    because its plan was known already."""
    accepted: int
    """Of these, replies of which a proposal entered the queue, or whose choice of parents was taken."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    busy: float
    """The share of them in which the worker measured."""


class Comparison(BaseModel):
    """What a call leaves in comparison.json."""

    arguments: dict[str, Any]
    results: list[SearchResult]


class MeasuringWorker:
    """A worker in this process. It keeps its model from search to search, and every outcome, by the candidate's id."""

    def __init__(self, redis_url: str, kept: Path) -> None:
        self._url, self._kept = redis_url, kept
        self._session: Session | None = None
        self._outcomes: dict[str, Outcome] = {}
        self.measured_by: dict[str, str] = {}
        """The search that each of them was measured for."""
        for record in _lines(kept):
            self._outcomes[record["id"]] = OUTCOME.validate_python(record["outcome"])
            self.measured_by[record["id"]] = record["search"]

    @asynccontextmanager
    async def serving(self, settings: Settings) -> AsyncIterator[None]:
        """Measure for one search, which is about to begin; where that fails, the search is cancelled.

        Raises SelfPrunerError for what a disk, a server or a device does.
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
        """The session of a spec; searches of one rate and seed share it."""
        if self._session is None or self._session.spec != spec:
            self._session = Session(spec)
        return self._session

    async def _serve(self, search: str, session: Session) -> None:
        redis, keys = connect(self._url), Keys(search)
        try:
            profiles = ProfileBoard(redis, keys)
            while await profiles.publish(session.profile) is None:  # noqa: ASYNC110  (the search has not said what it is of)
                await asyncio.sleep(0.1)
            jobs = JobQueue(redis, keys, "benchmark", lease_seconds=LEASE_SECONDS)
            while True:
                if job := await jobs.claim():
                    await jobs.commit(job, await self._outcome(job.candidate, session, search))
        except (OSError, RuntimeError, *AWAY) as error:
            raise SelfPrunerError(f"measuring for {search} failed: {error}; the same command goes on") from error
        finally:
            await redis.aclose()

    async def _outcome(self, candidate: Candidate, session: Session, search: str) -> Outcome:
        """As it is kept, if it is; who races is measured anew, for what it races against is another each time."""
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
        with closing(Lines(self._kept)) as lines:
            lines.append(json.dumps(record) + "\n")


@dataclass(frozen=True)
class PlainUniform:
    """Perplexities on the report text of uniform rates with nothing reconstructed."""

    rectangular: float
    any_heads: float
    """Where any query heads may go (masked), at as many parameters: on models with few KV heads the fairer figure."""


@products_in_float32()
def plain_uniform(specs: Sequence[SearchSpec], kept: Path) -> list[PlainUniform]:
    """What uniform rates have for each spec with nothing reconstructed, kept in a file.

    The specs differ in their pruning rate alone.
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
        replace(kept, json.dumps(found, indent=1) + "\n")
    return [PlainUniform(found[spec.fingerprint], found[_any_heads(spec)]) for spec in plain]


def _any_heads(spec: SearchSpec) -> str:
    """Under which name the figure of any heads is kept."""
    return f"{spec.fingerprint}, any heads"


def _figures(kept: Path) -> dict[str, float]:
    """Perplexities by the fingerprint of their spec; of a file that is not there or cannot be read, none."""
    try:
        return FIGURES.validate_json(kept.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def result_of(
    settings: Settings, method: str, summary: Summary, plain: PlainUniform, measured_by: Mapping[str, str]
) -> SearchResult:
    """What is kept of a search that has ended, from its folder; `measured_by` is the worker's."""
    best, figures, measure = summary.best, BestSoFar(), settings.search.fitness
    assert best is not None and best.report_perplexity is not None
    uniform = summary.uniform.kl if measure == "kl" else summary.uniform.perplexity
    everything = _lines(settings.folder / "evaluations.jsonl")
    evaluations = [e for e in everything if e["agent"] != "baseline"]
    tokens, whole = 0, summary.uniform.tokens or 1
    for evaluation in sorted(evaluations, key=lambda e: e["order"]):
        outcome = evaluation["outcome"]
        tokens += outcome.get("tokens", 0)
        if outcome["kind"] == "measured":
            figures.take(outcome[measure], -(-tokens // whole), tokens)
    name = settings.search.name
    own = [e for e in everything if measured_by.get(e["id"], name) == name]
    replies = [line for line in _lines(settings.folder / "log.jsonl") if line["event"] == "llm_reply"]
    return SearchResult(
        method=method,
        granularity=settings.search.granularity,
        rate=settings.target.rate,
        seed=settings.search.seed,
        budget=-(-tokens // whole),
        tokens=tokens,
        candidates=len(evaluations),
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
        busy=sum(e["outcome"].get("seconds", 0.0) for e in own) / summary.seconds,
    )


def keep_result(result: SearchResult, folder: Path, arguments: Mapping[str, Any]) -> None:
    """Keep what a search came to in its folder."""
    told = {"arguments": arguments, "result": result.model_dump()}
    replace(folder / RESULT, json.dumps(told, indent=1) + "\n")


def result_before(folder: Path) -> SearchResult | None:
    """What an earlier call has kept of the search in `folder`; None where that is nothing, or cannot be read."""
    try:
        return SearchResult.model_validate(json.loads((folder / RESULT).read_bytes())["result"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file of lines; those that a kill has torn are passed over."""
    found = []
    for line in file.read_bytes().splitlines() if file.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]
