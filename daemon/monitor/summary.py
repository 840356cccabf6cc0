"""The result of a search, as a JSON object and as a table."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import computed_field
from rich.console import Console
from rich.table import Table

from agents.population.population import Evaluation, Population
from daemon.monitor.status import llm_tokens
from daemon.search.figures import best_allocation, best_rule
from daemon.search.state import SearchState
from protocol.plans.allocation import uniform_label
from protocol.plans.candidate import SOURCE_NAMES, Measured, candidate_id
from protocol.plans.plan import Parameters, count_parameters, dense_plan
from protocol.plans.profile import DensePerplexity, ModelProfile
from protocol.plans.shape import Granularity
from protocol.plans.spec import Measure, Reconstruction, SearchSpec
from protocol.plans.value import Value

WEAK_BASELINE = (
    "uniform is a weak baseline here: without reconstruction, and with equally many query heads per KV head; "
    "`selfpruner evaluate --allocate uniform` measures stronger ones with --reconstruction least-squares or --heads any"
)

NOTHING_GAINED = (
    "the search has found nothing better than uniform pruning: give it more evaluations (search.rounds) and more text "
    "(data.fitness_windows), or begin with the settings of configs/best.yaml"
)


class Row(Value):
    """The figures of one model, such as the dense model or the best candidate. Unmeasured figures are None."""

    perplexity: float | None
    report_perplexity: float | None = None
    kl: float | None = None
    """Divergence from the dense model in nats per token, if the search minimises it."""
    report_kl: float | None = None
    parameters: Parameters
    seqlen: int
    tokens: int | None
    report_tokens: int | None = None


class Summary(Value):
    """The result of a search. `finished` is False when it was interrupted or stopped."""

    search: str
    model: str
    rate: float
    granularity: Granularity
    fitness: Measure
    """What the search minimised."""
    reconstruction: Reconstruction
    """The reconstruction of all candidates and of the uniform model."""
    finished: bool
    dense: Row
    uniform: Row
    best_allocation: Row | None
    """The best allocation in the first population (search.seeds)."""
    best_rule: Row | None
    """The best candidate whose rates come from a rule that the search has made."""
    rule: str | None
    """The rule of that candidate."""
    best: Row | None
    rates: tuple[float, ...]
    """The rates of the best candidate."""
    candidates: dict[str, dict[str, int]]
    """Counts `by_agent`, `by_source` and `by_outcome` (`measured`, `failed`, `stopped` in a race)."""
    tokens: dict[str, int]
    """LLM tokens: `prompt` and `completion`."""
    seconds: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def improved(self) -> bool | None:
        """Whether the best candidate is better than uniform pruning, on the report text if there is one.

        None if either is unknown.
        """
        best, uniform = self.best, self.uniform
        if best is None:
            return None
        pairs = ((best.report_kl, uniform.report_kl), (best.kl, uniform.kl))
        if self.fitness == "perplexity":
            pairs = ((best.report_perplexity, uniform.report_perplexity), (best.perplexity, uniform.perplexity))
        return next((ours < theirs for ours, theirs in pairs if ours is not None and theirs is not None), None)


def summarise(search: str, state: SearchState, counters: dict[str, float], *, finished: bool) -> Summary:
    """Return the result of a search; `counters` has the seconds and the tokens used."""
    spec, profile, population = state.spec, state.profile, state.population
    best, allocation, rule = population.best(), best_allocation(population), best_rule(population)
    uniform = spec.uniform_plan(profile.shape)
    uniform_evaluation = population.get(candidate_id(uniform, spec.fingerprint))
    outcomes = Counter(e.outcome.kind for e in population if e.candidate.is_proposal)
    return Summary(
        search=search,
        model=spec.model,
        rate=spec.rate,
        granularity=spec.granularity,
        fitness=spec.measure,
        reconstruction=spec.reconstruction,
        finished=finished,
        dense=_dense_row(spec, profile),
        uniform=_row(spec, count_parameters(uniform, profile.shape), uniform_evaluation, population),
        best_allocation=_measured_row(spec, allocation, population),
        best_rule=_measured_row(spec, rule, population),
        rule=rule.candidate.provenance.rule if rule else None,
        best=_measured_row(spec, best, population),
        rates=best.candidate.rates if best else (),
        candidates={
            "by_agent": dict(state.proposals.by_agent),
            "by_source": {"llm": 0, "fallback": 0, **state.proposals.by_source},
            "by_outcome": {name: outcomes[name] for name in ("measured", "failed", "stopped")},
        },
        tokens=llm_tokens(counters),
        seconds=round(counters.get("seconds", 0.0), 1),
    )


def _dense_row(spec: SearchSpec, profile: ModelProfile) -> Row:
    report: DensePerplexity | None = profile.dense_report
    kl = 0.0 if spec.measure == "kl" else None
    return Row(
        perplexity=profile.dense.perplexity,
        report_perplexity=report.perplexity if report else None,
        kl=kl,
        report_kl=kl if report else None,
        parameters=count_parameters(dense_plan(profile.shape), profile.shape),
        seqlen=spec.fitness.seqlen,
        tokens=profile.dense.tokens,
        report_tokens=report.tokens if report else None,
    )


def _measured_row(spec: SearchSpec, evaluation: Evaluation | None, population: Population) -> Row | None:
    if evaluation is None or not isinstance(evaluation.outcome, Measured):
        return None
    return _row(spec, evaluation.outcome.parameters, evaluation, population)


def _row(spec: SearchSpec, parameters: Parameters, evaluation: Evaluation | None, population: Population) -> Row:
    measured = evaluation.outcome if evaluation and isinstance(evaluation.outcome, Measured) else None
    report = population.get(candidate_id(evaluation.candidate.plan, spec.fingerprint, "report")) if evaluation else None
    reported = report.outcome if report and isinstance(report.outcome, Measured) else None
    return Row(
        perplexity=measured.perplexity if measured else None,
        report_perplexity=reported.perplexity if reported else None,
        kl=measured.kl if measured else None,
        report_kl=reported.kl if reported else None,
        parameters=parameters,
        seqlen=spec.fitness.seqlen,
        tokens=measured.tokens if measured else None,
        report_tokens=reported.tokens if reported else None,
    )


def show(summary: Summary, console: Console) -> None:
    """Print the table, and under it the sources of the candidates, the cost and the next step."""
    console.print(f"{summary.search}: {summary.model}, {summary.rate:.0%} of the decoder's parameters removed")
    console.print(_table(summary))
    for line in _lines(summary):
        console.print(line, soft_wrap=True)


def _table(summary: Summary) -> Table:
    columns = columns_of(summary)
    table = Table()
    table.add_column("")
    table.add_column(f"{columns[0].title} ÷ {uniform_label(summary.reconstruction)}", justify="right")
    for column in columns:
        table.add_column(column.title, justify="right")
    table.add_column("parameters", justify="right")
    for line in lines_of(summary):
        table.add_row(line.name, line.ratio, *line.figures, line.parameters)
    return table


@dataclass(frozen=True)
class Line:
    """A line of the table: a model's figures as text, one for each column."""

    name: str
    ratio: str
    """The minimised figure divided by that of uniform pruning."""
    figures: tuple[str, ...]
    parameters: str


def lines_of(summary: Summary) -> list[Line]:
    """Return the lines of the table."""
    columns = columns_of(summary)
    uniform = columns[0].of(summary.uniform)
    rows = {
        "dense": summary.dense,
        uniform_label(summary.reconstruction): summary.uniform,
        "best allocation without a search": summary.best_allocation,
        "best rule": summary.best_rule,
        "best": summary.best,
    }
    found = []
    for name, row in rows.items():
        if row is None:
            continue
        own = columns[0].of(row)
        ratio = own / uniform if own is not None and uniform and row is not summary.dense else None
        figures = tuple(number(column.of(row), column.digits) for column in columns)
        found.append(Line(name, number(ratio, 3), figures, f"{row.parameters.total_after / 1e6:,.1f} M"))
    return found


@dataclass(frozen=True)
class Column:
    """A column of the table, which shows one figure of each row."""

    title: str
    of: Callable[[Row], float | None]
    digits: int


def columns_of(summary: Summary) -> list[Column]:
    """Return the columns. The minimised figure comes first, and the ratio is computed from it."""
    kl = [Column("kl", lambda row: row.kl, 4), Column("kl on the report text", lambda row: row.report_kl, 4)]
    perplexity = [
        Column("perplexity", lambda row: row.perplexity, 2),
        Column("on the report text", lambda row: row.report_perplexity, 2),
    ]
    shown = 1 if summary.dense.report_perplexity is None else 2
    return (kl[:shown] if summary.fitness == "kl" else []) + perplexity[:shown]


def _lines(summary: Summary) -> list[str]:
    def listed(counts: dict[str, Any]) -> str:
        return ", ".join(f"{name} {count}" for name, count in counts.items())

    outcome = summary.candidates["by_outcome"]
    sources = {SOURCE_NAMES.get(name, name): count for name, count in summary.candidates["by_source"].items()}
    used = summary.tokens
    stopped = f", stopped early {outcome['stopped']}" if outcome["stopped"] else ""
    is_worth_it = summary.best and summary.improved is not False
    following = [f"next: selfpruner export --search {summary.search} --out DIR"] if is_worth_it else []
    unfinished = ["stopped before its end: these figures are not final; run the same command again to resume"]
    weak = [WEAK_BASELINE] if summary.reconstruction == "none" else []
    return [
        *(_without_gain(summary) if summary.finished else []),
        *weak,
        *([f"best rule: {summary.rule}"] if summary.rule else []),
        f"candidates by agent: {listed(summary.candidates['by_agent'])}",
        f"candidates by source: {listed(sources)}",
        f"measured {outcome['measured']}, failed {outcome['failed']}{stopped}; "
        f"LLM tokens: {used['prompt']:,} in, {used['completion']:,} out; {summary.seconds:,.0f} seconds",
        *(following if summary.finished else unfinished),
    ]


def _without_gain(summary: Summary) -> list[str]:
    """Return what to try if the best candidate is no better than uniform pruning."""
    if summary.improved is not False or summary.best is None:
        return []
    of = columns_of(summary)[0].of
    best, uniform = of(summary.best), of(summary.uniform)
    if best is not None and uniform is not None and best < uniform:
        return [
            "on the report text the best is no better than uniform: the search has overfitted its fitness text; raise "
            "data.fitness_windows"
        ]
    return [NOTHING_GAINED]


def number(value: float | None, digits: int = 2) -> str:
    """Return a figure for a table; a dash if it was not measured."""
    return "–" if value is None else f"{value:,.{digits}f}"
