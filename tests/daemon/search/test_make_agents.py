"""Who proposes: the methods that the LLM's search is compared with, its agents replaced one by one, and seeds."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from redis.asyncio import Redis

from agents.baselines.cma_es import CmaEsMutator
from agents.baselines.seeds import seed_rates, submit_seeds
from agents.population.view import Accepted, Refused, View
from agents.prompting.settings import ReplyFormat
from daemon.monitor.summary import summarise
from daemon.search.search import Search
from daemon.settings.rules import seed_allocation
from daemon.settings.search import SearchSettings
from protocol.errors import BudgetError
from protocol.plans.allocation import Allocation, Method
from protocol.plans.candidate import Measured, Provenance, candidate_id
from protocol.plans.plan import attention_levels
from protocol.plans.rule import Rule
from protocol.plans.shape import LayerShape, ModelShape
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.queue.keys import Keys
from tests.support.conducted import SETTINGS, Conducted, killed_until_it_ends
from tests.support.samples import PROFILE, SHAPE, SPEC
from tests.support.schema_answers import SchemaChat

pytestmark = pytest.mark.one_server

BLOCKS = SPEC.model_copy(update={"granularity": "block"})
BLOCK_PROFILE = PROFILE.model_copy(
    update={"sensitivity": (0.4, 0.1, 0.4, 0.2, 0.4, 0.1, 0.4, 0.3), "outliers": (3.0, 1.0, 1.0, 2.0)}
)
TOTAL = 15


def settings(**update: Any) -> SearchSettings:
    return SearchSettings.model_validate(SETTINGS.model_dump() | update)


async def searched(
    redis: Redis,
    name: str,
    folder: Path,
    chosen: SearchSettings,
    spec: SearchSpec = SPEC,
    reply: ReplyFormat = "edits",
) -> tuple[Search, SchemaChat]:
    chat = SchemaChat()
    profile = BLOCK_PROFILE.model_copy(
        update={"sensitivity": BLOCK_PROFILE.sensitivity[: len(SHAPE.units(spec.granularity))]}
    )
    conducted = Conducted(
        redis, Keys(name), folder / name, settings=chosen, chat=chat, spec=spec, profile=profile, reply=reply
    )
    return await conducted.searched(), chat


@pytest.mark.parametrize("spec", [SPEC, BLOCKS], ids=["layer", "block"])
@pytest.mark.parametrize("proposer", ["random", "evolution", "cma-es"])
async def test_a_classical_method_goes_through_the_same_pipeline_and_asks_no_llm(
    redis: Redis, tmp_path: Path, proposer: str, spec: SearchSpec
) -> None:
    search, chat = await searched(redis, "one", tmp_path, settings(proposer=proposer), spec)
    assert chat.asked == 0
    assert search.state.proposals.by_source == {"classical": TOTAL}
    assert len(search.state.population) == TOTAL
    for candidate in search.state.ledger.values():
        left = candidate.plan.decoder_parameters(SHAPE)
        assert abs(left - 0.7 * SHAPE.decoder_parameters) <= SHAPE.channel_parameters


@pytest.mark.parametrize("proposer", ["random", "evolution", "cma-es", "best-of-n"])
async def test_what_is_proposed_after_a_kill_is_what_would_have_been(
    redis: Redis, tmp_path: Path, proposer: str
) -> None:
    chosen = settings(proposer=proposer)
    calm, _ = await searched(redis, "calm", tmp_path, chosen, BLOCKS)
    search, _, kills = await killed_until_it_ends(
        lambda: Conducted(
            redis, Keys("killed"), tmp_path / "killed", settings=chosen, spec=BLOCKS, profile=BLOCK_PROFILE
        )
    )
    assert kills >= 2
    assert {c.id: c for c in search.state.ledger.values()} == {c.id: c for c in calm.state.ledger.values()}


async def test_evolution_breeds_from_the_best_alone(redis: Redis, tmp_path: Path) -> None:
    search, _ = await searched(redis, "one", tmp_path, settings(proposer="evolution"), BLOCKS)
    for round_ in (1, 2):
        (best,) = search.state.population.top(1, before=round_)
        offspring = [c for c in search.state.ledger.values() if c.provenance.round == round_]
        assert {c.provenance.parents for c in offspring} == {(best.candidate.id,)}


async def test_evolution_also_switches_whole_heads(redis: Redis, tmp_path: Path) -> None:
    chosen = settings(proposer="evolution", rounds=6)
    search, _ = await searched(redis, "one", tmp_path, chosen, BLOCKS)
    parents = {c.id: c for c in search.state.ledger.values()}
    switched = Counter(
        child.plan.layers[i].query_heads != parents[child.provenance.parents[0]].plan.layers[i].query_heads
        for child in search.state.ledger.values()
        if child.provenance.parents
        for i in range(len(SHAPE.layers))
    )
    assert switched[True] and switched[False] > switched[True]


async def test_cma_es_learns_from_what_was_measured(redis: Redis, tmp_path: Path) -> None:
    """Its later generations are better than its first, which random search's are not."""
    chosen = {"population": 5, "mutations": 8, "crossovers": 0, "rounds": 12}
    search, _ = await searched(redis, "cma", tmp_path, settings(proposer="cma-es", **chosen))
    by_round = {
        round_: sorted(
            e.outcome.fitness  # type: ignore[union-attr]
            for e in search.state.population
            if e.candidate.provenance.round == round_ and e.candidate.provenance.agent != "baseline"
        )
        for round_ in range(13)
    }
    assert by_round[12][len(by_round[12]) // 2] < by_round[1][len(by_round[1]) // 2]


async def test_cma_es_goes_on_from_what_was_long_beaten_too(redis: Redis, tmp_path: Path) -> None:
    """A view shows the best and the last candidates of a long search; a new process draws as one that saw them all."""
    chosen = settings(proposer="cma-es", population=5, mutations=8, crossovers=0, rounds=6)
    search, _ = await searched(redis, "cma", tmp_path, chosen)
    view = search.view(7)
    all_seen = await drawn(view, 8)
    assert len(all_seen) == 8
    assert await drawn(replace(view, measured=view.measured[:3], recent=view.recent[-2:]), 8) == all_seen
    assert await drawn(replace(view, fitness_of=lambda _: None), 8) != all_seen


async def drawn(view: View, count: int) -> list[tuple[float, ...]]:
    """What a new process of CMA-ES proposes."""
    rates: list[tuple[float, ...]] = []

    async def accept(proposed: Sequence[float], _: Provenance) -> Accepted:
        rates.append(tuple(proposed))
        return Accepted("0" * 16)

    await CmaEsMutator(count).propose(view, view.population, count, accept)
    return rates


async def test_cma_es_draws_between_the_lowest_and_the_highest_rate() -> None:
    spec = BLOCKS.model_copy(update={"lowest_rate": 0.2, "highest_rate": 0.4})
    found = await drawn(View(spec, BLOCK_PROFILE, 1, ()), 16)
    assert len(found) == 16 and all(0.2 <= rate <= 0.4 for rates in found for rate in rates)
    assert min(map(min, found)) < 0.25 and max(map(max, found)) > 0.35


async def test_what_cma_es_draws_without_a_plan_is_no_good_and_no_end() -> None:
    """Widths of 256 channels near the highest rate: some of what is drawn cannot be met by whole ones."""
    layer = LayerShape(query_heads=9, kv_heads=3, mlp_channels=1536)
    of_heads = {"query_head_parameters": 2 * 64 * 576, "kv_head_parameters": 2 * 64 * 576}
    widths = {"hidden_size": 576, "head_dim": 64, "layers": (layer,) * 30, "channel_parameters": 3 * 576}
    shape = ModelShape.model_validate(SHAPE.model_dump() | widths | of_heads)
    spec = SPEC.model_copy(update={"rate": 0.8, "multiple_of": 256})
    view = View(spec, PROFILE.model_copy(update={"shape": shape, "sensitivity": (0.1,) * 30}), 1, ())
    planless = 0

    async def submit(rates: Sequence[float], _: Provenance) -> Accepted | Refused:
        nonlocal planless
        if (id_ := view.candidate_id(rates)) is None:
            planless += 1
            return Refused("it has no plan")
        return Accepted(id_)

    mutator = CmaEsMutator(16)
    for round_ in (1, 2):
        await mutator.propose(replace(view, round=round_), (), 16, submit)
    assert planless


async def test_best_of_n_asks_the_llm_the_same_in_every_round(redis: Redis, tmp_path: Path) -> None:
    search, chat = await searched(redis, "one", tmp_path, settings(proposer="best-of-n"))
    assert {label.split()[0] for label in chat.labels} == {"initializer"}
    assert search.budget.proposed == TOTAL and set(search.state.proposals.by_agent) == {"initializer"}
    assert all(not c.provenance.parents for c in search.state.ledger.values())


@pytest.mark.parametrize(
    ("switch", "silent"),
    [
        ({"initializer": "random"}, "initializer"),
        ({"selector": "tournament"}, "selector"),
        ({"selector": "none"}, "selector"),
        ({"mutator": "classical"}, "mutator"),
        ({"crossover": "classical"}, "crossover"),
        ({"mutations": 0, "crossovers": 5}, "mutator"),
        ({"mutations": 5, "crossovers": 0}, "crossover"),
    ],
    ids=str,
)
async def test_each_agent_of_the_llm_can_be_replaced_or_left_out(
    redis: Redis, tmp_path: Path, switch: dict[str, Any], silent: str
) -> None:
    search, chat = await searched(redis, "one", tmp_path, settings(**switch))
    asked = {label.split()[0] for label in chat.labels}
    assert asked == {"initializer", "selector", "mutator", "crossover"} - {silent}
    assert search.budget.proposed == TOTAL


@pytest.mark.parametrize("spec", [SPEC, BLOCKS], ids=["layer", "block"])
async def test_seeds_are_members_of_the_first_population(redis: Redis, tmp_path: Path, spec: SearchSpec) -> None:
    methods = ("sensitivity", "owl", "rule:rate - 0.3*depth")
    search, _ = await searched(redis, "one", tmp_path, settings(seeds=methods), spec)
    assert search.state.proposals.by_agent == {"seed": 3, "initializer": 2, "mutator": 6, "crossover": 4}
    view = View(spec, search.state.profile, 0, ())
    for method in methods:
        id_ = candidate_id(spec.plan(seed_rates(seed_allocation(method), view), SHAPE), spec.fingerprint)
        assert search.state.ledger[id_].provenance.agent == "seed"
        assert search.state.ledger[id_].provenance.source == "allocation"
    # Uniform is measured in any case, to compare with.
    assert candidate_id(spec.uniform_plan(SHAPE), spec.fingerprint) in search.state.ledger


async def test_a_seed_that_an_earlier_process_made_is_not_made_again() -> None:
    made: list[int] = []

    async def submit(_: Sequence[float], provenance: Provenance) -> Accepted | Refused:
        made.append(provenance.call)
        return Accepted("0" * 16)

    view = View(SPEC, PROFILE, 0, (), {("seed", 0): frozenset({"a" * 16})})
    await submit_seeds([seed_allocation("rule:rate - depth"), seed_allocation("first-layer")], view, submit)
    assert made == [1]


@pytest.mark.parametrize("by", ["llm", "rules"])
async def test_a_search_by_rules_keeps_them_beside_its_best(
    redis: Redis, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.state.journal.KEPT_RULES", 5)
    agents = dict.fromkeys(("initializer", "mutator", "crossover"), by)
    chosen = settings(seeds=["rule:rate - 0.2*depth"], rounds=4, selector="tournament", **agents)
    spec = BLOCKS.model_copy(update={"report": TextSpec(source="self", windows=2, seqlen=32)})
    search, chat = await searched(redis, "one", tmp_path, chosen, spec, reply="rules")
    assert bool(chat.asked) == (by == "llm")
    ruled = [e for e in search.state.population.top(None) if e.candidate.provenance.rule]
    kept = json.loads((tmp_path / "one" / "rules.json").read_text())
    fitness = [e.outcome.fitness for e in ruled if isinstance(e.outcome, Measured)]
    assert [rule["perplexity"] for rule in kept["rules"]] == fitness[:5] and len(fitness) > 5
    assert {e.candidate.provenance.agent for e in ruled} >= {"seed", "initializer", "mutator"}
    assert any(c.provenance.round > 0 and not c.provenance.rule for c in search.state.ledger.values()), "moves too"
    view = View(spec, search.state.profile, 0, ())
    for evaluation in ruled:
        rates = Rule.parse(evaluation.candidate.provenance.rule or "").rates(view.features)
        assert view.candidate_id(rates) == evaluation.candidate.id, "its rates are what the rule says"
    summary = summarise("one", search.state, {}, finished=True)
    own = next(e.candidate for e in ruled if e.candidate.provenance.source != "allocation")
    assert summary.rule == own.provenance.rule
    assert summary.best_rule is not None and summary.best_rule.report_perplexity is not None


@pytest.mark.parametrize("method", ["owl", "uniform", "first-layer", "llm-pruner"])
def test_with_blocks_a_layers_rate_is_taken_from_its_mlp(method: Method) -> None:
    view = View(BLOCKS, BLOCK_PROFILE, 0, ())
    plan = BLOCKS.plan(BLOCKS.feasible(seed_rates(Allocation(method=method), view), SHAPE), SHAPE)
    assert [layer.query_heads for layer in plan.layers] == [whole.query_heads for whole in SHAPE.layers]
    steep = View(BLOCKS.model_copy(update={"rate": 0.8}), BLOCK_PROFILE, 0, ())
    plan = steep.spec.plan(steep.spec.feasible(seed_rates(Allocation(method="uniform"), steep), SHAPE), SHAPE)
    assert all(layer.query_heads < whole.query_heads for layer, whole in zip(plan.layers, SHAPE.layers, strict=True))


@pytest.mark.parametrize("method", ["owl", "sensitivity"])
def test_a_profile_that_says_too_little_has_no_such_seed(method: Method) -> None:
    bare = PROFILE.model_copy(update={"sensitivity": (), "outliers": ()})
    with pytest.raises(BudgetError, match=f"does not have what {method} needs"):
        seed_rates(Allocation(method=method), View(SPEC, bare, 0, ()))


def test_the_shares_of_attention_levels_are_those_levels() -> None:
    for layer in range(len(SHAPE.layers)):
        for share, (kv, each) in attention_levels(SHAPE, layer):
            rates = [0.0, 0.2] * 4
            rates[2 * layer] = share
            mean = sum(r * u.parameters for r, u in zip(rates, SHAPE.units("block"), strict=True))
            spec = BLOCKS.model_copy(update={"rate": round(mean / SHAPE.decoder_parameters, 5)})
            plan = spec.plan(spec.feasible(rates, SHAPE), SHAPE)
            assert (plan.layers[layer].kv_heads, plan.layers[layer].queries_per_kv) == (kv, each)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"proposer": "annealing"}, "'llm', 'best-of-n', 'random', 'evolution' or 'cma-es'"),
        (
            {"seeds": ["luck"]},
            "no allocation: give uniform, first-layer, owl, llm-pruner, sensitivity, rule or rule:NAME",
        ),
        ({"max_evaluations": 4}, "max_evaluations (4) is smaller than the first population (5)"),
        (
            {"population": 2, "seeds": ["uniform", "owl", "sensitivity"]},
            "3 seeds are more than the first population (2)",
        ),
        ({"mode": "steady-state", "proposer": "cma-es"}, "`cma-es` learns from generations"),
        ({"mode": "steady-state", "mutations": 0, "crossovers": 0}, "needs search.mutations or search.crossovers"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as error:
        settings(**wrong)
    assert says in str(error.value)
