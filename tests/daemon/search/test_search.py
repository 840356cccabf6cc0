"""A whole search with a real server, a scripted LLM and an instant evaluator: Algorithm 1, killed and resumed."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from daemon.monitor.summary import summarise
from daemon.search.search import Search
from protocol.plans.candidate import Candidate, Failed, Measured
from protocol.plans.spec import TextSpec
from protocol.queue.keys import Keys
from tests.support.conducted import (
    SETTINGS,
    Conduct,
    Conducted,
    evaluating,
    evaluations,
    killed_until_it_ends,
    unevenness,
)
from tests.support.samples import PROFILE, SHAPE, SPEC
from tests.support.schema_answers import SchemaChat


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


async def test_the_report_text_is_measured_for_uniform_the_best_allocation_and_the_best(conduct: Conduct) -> None:
    def report_is_worse(candidate: Candidate) -> Measured | Failed:
        outcome = unevenness(candidate)
        return outcome.model_copy(update={"perplexity": outcome.perplexity + (candidate.text == "report")})

    spec = SPEC.model_copy(update={"report": TextSpec(source="self", windows=2, seqlen=32)})
    with capture_logs() as lines:
        settings = SETTINGS.model_copy(
            update={"seeds": ("first-layer", "rule:rate - 0.1*sensitivity"), "max_evaluations": 8}
        )
        search = await conduct(spec=spec, settings=settings).searched(report_is_worse)
    summary = summarise("test", search.state, {}, finished=True)
    assert any(each.candidate.provenance.rule for each in search.state.population), "it began with a rule"
    assert summary.best_rule is None, "which is an allocation"
    for row in (summary.uniform, summary.best_allocation, summary.best):
        assert row is not None and row.report_perplexity is not None and row.perplexity is not None
        assert row.report_perplexity == pytest.approx(row.perplexity + 1)
    said = [line["says"] for line in lines if line["event"] == "candidate_measured" and line["text"] == "report"]
    names = {text.removeprefix("on the report text: ").rpartition(" ")[0] for text in said}
    assert {"uniform", "best"} <= names <= {"uniform", "best", "best allocation"}


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
