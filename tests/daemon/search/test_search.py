"""A whole search with a real server, a scripted LLM and an instant evaluator: Algorithm 1, killed and resumed."""

import asyncio
import io
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from rich.console import Console
from structlog.testing import capture_logs

from agents.llm.endpoint import ChatClient
from agents.prompting.settings import ReplyFormat
from daemon.monitor.remote import BestSoFar, RemoteSearch
from daemon.monitor.summary import Summary, show, summarise
from daemon.search.make_agents import make_agents
from daemon.search.modes import rounds_of
from daemon.search.search import Search
from daemon.search.state import SearchState
from daemon.settings.llm import LlmSettings
from daemon.settings.search import SearchSettings
from daemon.state.journal import Journal
from daemon.state.store import SearchStore
from protocol.plans.candidate import Candidate, Failed, Measured, Outcome
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from tests.support.samples import PROFILE, SHAPE, SPEC, measured
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


@pytest.fixture
def conduct(redis: Redis, keys: Keys, tmp_path: Path) -> Conduct:
    """Make a search with options of `Conducted`."""
    return partial(Conducted, redis, keys, tmp_path)


@pytest.fixture
async def search(conduct: Conduct) -> Search:
    """A search that has ended."""
    return await conduct().searched()


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


async def test_a_search_makes_the_papers_number_of_candidates_and_measures_each_once(
    redis: Redis, keys: Keys, conduct: Conduct
) -> None:
    async with evaluating(redis, keys) as evaluated:
        search = await conduct().run()
    by_agent = search.state.proposals.by_agent
    assert by_agent == {"initializer": 5, "mutator": 6, "crossover": 4}
    assert set(evaluated.values()) == {1}
    assert set(evaluated) == set(search.state.ledger)
    assert len(search.state.population) == 15
    assert search.state.proposals.by_source["llm"] > 10


async def test_every_candidate_is_on_budget_and_the_best_is_written_with_its_rates(
    search: Search, tmp_path: Path
) -> None:
    for candidate in search.state.ledger.values():
        left = candidate.plan.decoder_parameters(SHAPE)
        assert abs(left - 0.7 * SHAPE.decoder_parameters) <= SHAPE.channel_parameters
    best = json.loads((tmp_path / "best.json").read_text())
    record = min(
        (e for e in evaluations(tmp_path) if e["agent"] != "baseline"), key=lambda e: e["outcome"]["perplexity"]
    )
    assert (best["id"], best["perplexity"]) == (record["id"], record["outcome"]["perplexity"])
    assert tuple(best["rates"]) == search.state.population.top(1)[0].candidate.rates


async def test_a_search_killed_anywhere_goes_on_and_measures_nothing_twice(conduct: Conduct, tmp_path: Path) -> None:
    search, evaluated, kills = await killed_until_it_ends(conduct, look_after=0.002)
    assert kills >= 3
    assert len(search.state.ledger) == 1 + 5 + 2 * 5
    assert set(evaluated.values()) == {1}
    records = evaluations(tmp_path)
    assert sorted(r["id"] for r in records) == sorted(search.state.ledger)
    assert [r["order"] for r in records] == list(range(len(search.state.ledger)))


@pytest.mark.parametrize(("per_call", "max_tokens"), [(None, None), (3, None), (None, 5 * 62 + 1)])
async def test_a_search_that_was_killed_anywhere_has_the_history_of_an_undisturbed_one(
    redis: Redis, tmp_path: Path, per_call: int | None, max_tokens: int | None
) -> None:
    """Also one whose tokens are used up in its first round, after whose first outcome it may be killed."""
    chats: list[SchemaChat] = []

    def make(name: str) -> Conducted:
        chats.append(SchemaChat())
        chosen = SETTINGS.model_copy(update={"max_tokens": max_tokens})
        return Conducted(redis, Keys(name), tmp_path, settings=chosen, chat=chats[-1], proposals_per_call=per_call)

    undisturbed = await make("calm").searched()
    assert undisturbed.budget.proposed == (10 if max_tokens else undisturbed.settings.planned)
    search, _, kills = await killed_until_it_ends(partial(make, "killed"))
    assert kills >= 2
    assert {c.id: c for c in search.state.ledger.values()} == {c.id: c for c in undisturbed.state.ledger.values()}
    selections = [label for chat in chats[1:] for label in chat.labels if re.match("selector .* attempt 0", label)]
    assert len(selections) <= SETTINGS.rounds + 1  # once more where it was killed before the answer was kept


async def test_a_finished_search_that_is_started_again_asks_and_measures_nothing(
    redis: Redis, keys: Keys, tmp_path: Path, search: Search, conduct: Conduct
) -> None:
    chat = SchemaChat()
    async with evaluating(redis, keys) as evaluated:
        again = await conduct(chat=chat).run()
    assert not evaluated and not chat.asked
    assert len(evaluations(tmp_path)) == len(again.state.ledger) == len(search.state.ledger)


async def test_more_rounds_go_on_from_a_finished_search(search: Search, conduct: Conduct) -> None:
    longer = await conduct(settings=SETTINGS.model_copy(update={"rounds": 3})).searched()
    assert longer.state.proposals.by_agent == {"initializer": 5, "mutator": 9, "crossover": 6}


async def test_a_budget_of_evaluations_is_kept_exactly(conduct: Conduct) -> None:
    search = await conduct(settings=SETTINGS.model_copy(update={"max_evaluations": 8})).searched()
    assert search.budget.proposed == len(search.state.population) == 8


async def test_failed_candidates_stay_out_of_the_population_and_the_search_ends(
    conduct: Conduct, tmp_path: Path
) -> None:
    def every_other_fails(candidate: Candidate) -> Measured | Failed:
        return Failed(reason="timeout") if int(candidate.id, 16) % 2 else unevenness(candidate)

    search = await conduct().searched(every_other_fails)
    failed = [e for e in evaluations(tmp_path) if e["outcome"]["kind"] == "failed" and e["agent"] != "baseline"]
    assert failed
    assert len(search.state.population) == search.budget.proposed - len(failed)


async def test_block_granularity_gives_one_rate_to_each_block(conduct: Conduct) -> None:
    spec = SPEC.model_copy(update={"granularity": "block"})
    blocks = PROFILE.model_copy(update={"sensitivity": (0.1,) * 8})
    search = await conduct(spec=spec, profile=blocks).searched()
    assert {len(c.rates) for c in search.state.ledger.values()} == {8}
    assert search.state.proposals.by_source["llm"] > 10


async def test_the_report_text_is_measured_for_uniform_and_for_the_best(conduct: Conduct) -> None:
    def report_is_worse(candidate: Candidate) -> Measured | Failed:
        outcome = unevenness(candidate)
        return outcome.model_copy(update={"perplexity": outcome.perplexity + (candidate.text == "report")})

    spec = SPEC.model_copy(update={"report": TextSpec(source="self", windows=2, seqlen=32)})
    search = await conduct(spec=spec).searched(report_is_worse)
    summary = summarise("test", search.state, {}, finished=True)
    assert summary.best is not None
    for row in (summary.uniform, summary.best):
        assert row.report_perplexity is not None and row.perplexity is not None
        assert row.report_perplexity == pytest.approx(row.perplexity + 1)


async def test_a_search_that_minimises_divergence_ranks_by_it_and_shows_both(
    redis: Redis, keys: Keys, tmp_path: Path, conduct: Conduct
) -> None:
    def the_less_perplexed_the_more_divergent(candidate: Candidate) -> Measured | Failed:
        outcome = unevenness(candidate)
        return outcome.model_copy(update={"kl": 10 / outcome.perplexity})

    spec = SPEC.model_copy(update={"measure": "kl", "report": SPEC.fitness})
    search = await conduct(spec=spec).searched(the_less_perplexed_the_more_divergent)
    outcomes = [e.outcome for e in search.state.population.top(15) if isinstance(e.outcome, Measured)]
    assert [o.perplexity for o in outcomes] == sorted((o.perplexity for o in outcomes), reverse=True)
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["kl"], best["perplexity"]) == (outcomes[0].kl, outcomes[0].perplexity)

    summary = summarise("test", search.state, {}, finished=True)
    assert summary.best is not None and summary.best.kl == summary.best.report_kl == outcomes[0].kl
    assert summary.uniform.kl is not None and summary.dense.kl == 0
    text = shown(summary)
    ratio = summary.best.kl / summary.uniform.kl  # type: ignore[operator]
    assert f"{summary.best.kl:.4f}" in text and f"{summary.best.perplexity:.2f}" in text and f"{ratio:.3f}" in text

    status = await RemoteSearch(redis, keys, spec).status()
    assert (status.fitness, status.best_kl, status.best_perplexity) == ("kl", best["kl"], best["perplexity"])


async def test_the_table_of_a_search_that_minimises_perplexity_does_not_speak_of_divergence(
    redis: Redis, keys: Keys, search: Search
) -> None:
    text = shown(summarise("test", search.state, {}, finished=True))
    assert "perplexity" in text and "kl" not in text.split()
    assert (await RemoteSearch(redis, keys, SPEC).status()).best_kl is None
    (dense,) = [line for line in text.splitlines() if "dense" in line]
    assert dense.split("│")[2].strip() == "–", "the dense model is no ratio to a pruned one"
    assert "not final" not in text
    stopped = shown(summarise("test", search.state, {}, finished=False))
    assert stopped.splitlines()[-1].endswith("these figures are not final; run the same command again to resume")


async def test_the_best_so_far_says_whether_its_search_was_finished(redis: Redis, keys: Keys, search: Search) -> None:
    """Here no daemon has said that it is."""
    known = search.state.population.outcomes - 1  # without the baseline
    await redis.set(keys.profile, PROFILE.model_copy(update={"fingerprint": SPEC.fingerprint}).model_dump_json())
    best = await RemoteSearch(redis, keys, SPEC).best_so_far()
    assert best.origin == f"search {keys.search}, unfinished, after {known} candidates"
    assert best.status is not None
    finished = best.status.model_copy(update={"finished": True})
    await redis.set(keys.condition, "of another version")
    again = await RemoteSearch(redis, keys, SPEC).best_so_far()
    assert again.record == best.record and again.status == best.status, "it takes nothing from the rates"
    await redis.delete(keys.condition)
    assert BestSoFar(best.record, finished).origin == f"search {keys.search}"


def shown(summary: Summary) -> str:
    """The summary as a person sees it."""
    console = Console(width=200, file=io.StringIO())
    show(summary, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


async def test_the_summary_says_where_the_best_is_only_best_on_what_was_searched_on(search: Search) -> None:
    summary = summarise("test", search.state, {}, finished=True)
    assert summary.best is not None
    for best, uniform, said in ((57.0, 44.5, True), (44.0, 44.5, False), (None, 44.5, False), (57.0, None, False)):
        changed = summary.model_copy(
            update={
                "best": summary.best.model_copy(update={"report_perplexity": best}),
                "uniform": summary.uniform.model_copy(update={"report_perplexity": uniform}),
            }
        )
        assert ("on the report text the best is no better than uniform" in shown(changed)) == said
        assert ("next: selfpruner export" in shown(changed)) != said and changed.model_dump()["improved"] is not said


async def test_each_outcome_says_where_the_search_stands(conduct: Conduct) -> None:
    with capture_logs() as lines:
        search = await conduct().searched()
    said = [line["says"] for line in lines if line["event"] == "candidate_measured"]
    (uniform,) = [says for says in said if says.startswith("measured uniform: ")]
    assert len(said) == 16 and re.fullmatch(r"measured uniform: \d+\.\d\d \(best .*, dense 10\.00\)", uniform)
    best = f"{search.state.population.top(1)[0].outcome.fitness:,.2f}"  # type: ignore[union-attr]
    number = r"\d+\.\d\d"
    form = rf"measured 15/15: {number}(, new best)? \(best {best} = 0\.\d{{3}} × uniform {number}, dense 10\.00\)"
    assert re.fullmatch(form, said[-1])
    assert max(map(len, said)) < 87, "with the time and the level before it, a line fits in 120 columns"


async def test_a_search_without_gain_says_so_and_does_not_propose_to_export(search: Search) -> None:
    summary = summarise("test", search.state, {}, finished=True)
    assert summary.improved and "next: selfpruner export" in shown(summary)
    none = summary.model_copy(update={"best": summary.uniform})
    assert none.improved is False
    assert "nothing better than uniform pruning" in shown(none) and "export" not in shown(none)


async def test_the_summary_says_which_uniform_the_ratio_is_to(search: Search) -> None:
    plain, fitted = (
        summarise("test", replace(search.state, spec=spec), {}, finished=True)
        for spec in (SPEC, SPEC.model_copy(update={"reconstruction": "least-squares"}))
    )
    assert "perplexity ÷ uniform, rectangular" in shown(plain) and "÷ uniform, fitted" in shown(fitted)
    weak = "uniform is a weak baseline here"
    assert weak in shown(plain) and weak not in shown(fitted)
    assert plain.model_dump()["uniform"].keys() == plain.model_dump()["best"].keys()


async def test_the_summary_has_the_best_allocation_without_a_search(
    redis: Redis, tmp_path: Path, conduct: Conduct
) -> None:
    search = await conduct(settings=SETTINGS.model_copy(update={"seeds": ("owl", "first-layer")})).searched()
    summary = summarise("test", search.state, {}, finished=True)
    seeds = [
        e.outcome.perplexity
        for e in search.state.population
        if e.candidate.provenance.source == "allocation" and isinstance(e.outcome, Measured)
    ]
    assert len(seeds) == 2 and summary.best_allocation is not None
    assert summary.best_allocation.perplexity == min(seeds)
    (row,) = [line for line in shown(summary).splitlines() if "best allocation" in line]
    assert f"{min(seeds):,.2f}" in row
    without = await Conducted(redis, Keys("without"), tmp_path / "without").searched()
    summary = summarise("test", without.state, {}, finished=True)
    assert summary.best_allocation is None and "best allocation" not in shown(summary)


async def test_the_summary_counts_who_made_what(search: Search) -> None:
    counters = {"prompt_tokens": 700.0, "completion_tokens": 70.0, "seconds": 12.34}
    summary = summarise("test", search.state, counters, finished=True)
    assert summary.candidates["by_agent"] == {"initializer": 5, "mutator": 6, "crossover": 4}
    assert sum(summary.candidates["by_source"].values()) == 15
    assert summary.candidates["by_outcome"] == {"measured": 15, "failed": 0, "stopped": 0}
    assert summary.tokens == {"prompt": 700, "completion": 70}
    assert summary.uniform.parameters.decoder_after < summary.dense.parameters.decoder_after
    assert json.loads(summary.model_dump_json())["rates"] == list(summary.rates)
