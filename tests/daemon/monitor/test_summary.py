"""What is said of a search: its summary, and the best so far."""

import io
import json
from dataclasses import replace
from pathlib import Path

from redis.asyncio import Redis
from rich.console import Console

from daemon.monitor.remote import BestSoFar, RemoteSearch
from daemon.monitor.summary import Summary, show, summarise
from daemon.search.search import Search
from protocol.plans.candidate import Candidate, Failed, Measured
from protocol.queue.keys import Keys
from tests.support.conducted import SETTINGS, Conduct, Conducted, unevenness
from tests.support.samples import PROFILE, SPEC


def shown(summary: Summary) -> str:
    """The summary as a person sees it."""
    console = Console(width=200, file=io.StringIO())
    show(summary, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


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
