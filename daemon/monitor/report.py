"""The report of one or more searches: a single HTML file that needs no network, with the charts and the figures."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from agents.population.population import Evaluation
from daemon.monitor.charts import draw_population, draw_progress, draw_rates
from daemon.monitor.drawing import Drawing
from daemon.monitor.record import SearchRecord
from daemon.monitor.summary import columns_of, lines_of
from protocol.errors import UsageError
from protocol.plans.candidate import SOURCE_NAMES, Failed, Measured
from protocol.plans.spec import FIGURE_DIGITS, MEASURE_NAMES
from protocol.runtime.files import write_atomically

REPORT = "report.html"
"""File of a search's folder with its report."""
CHARTS: dict[str, Callable[[SearchRecord], Drawing]] = {
    "progress": draw_progress,
    "rates": draw_rates,
    "population": draw_population,
}
"""The charts of one search by their names."""
NEARLY_WHOLE = 0.05
"""Pruning rate below which a unit counts as kept."""
UNITS_NAMED = 20
BEST_SHOWN = 20
"""Candidates in the table of the best ones."""


def render_report(records: Sequence[SearchRecord]) -> str:
    """Return the HTML of a report on these searches. What models and endpoints wrote is shown as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("daemon.monitor") / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        searches=[overview(record) | _charts(record) for record in records],
        compared=Markup(draw_progress(*records).svg) if len(records) > 1 else None,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


def save_report(records: Sequence[SearchRecord], file: Path) -> None:
    """Write the report, and the folder that it is to lie in. Raises UsageError if that is not possible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, render_report(records))
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}") from error


def charts_of(records: Sequence[SearchRecord]) -> dict[str, Drawing]:
    """Return all charts of a report by the names of their files, without a suffix."""
    charts = {"compared": draw_progress(*records)} if len(records) > 1 else {}
    for record in records:
        charts |= {f"{record.search}-{name}": draw(record) for name, draw in CHARTS.items()}
    return charts


def _charts(record: SearchRecord) -> dict[str, Markup]:
    # drawing.py escapes every text.
    return {name: Markup(draw(record).svg) for name, draw in CHARTS.items()}


def overview(record: SearchRecord) -> dict[str, Any]:
    """Return the figures and tables of a search, as JSON has them."""
    summary, spec, status = record.summary, record.spec, record.status
    return {
        "name": record.search,
        "model": spec.model,
        "rate": f"{spec.rate:.0%}",
        "verdict": _verdict(record),
        "kept": _kept(record),
        "columns": [column.title for column in columns_of(summary)],
        "lines": [asdict(line) for line in lines_of(summary)],
        "measure": MEASURE_NAMES[spec.measure],
        "agents": _agents(record),
        "endpoints": _endpoints(record),
        "questions": {name: each.model_dump() for name, each in status.questions.items()} if status else {},
        "tokens": summary.tokens,
        "cost": status.cost if status else 0.0,
        "seconds": summary.seconds,
        "best": [_candidate(record, member) for member in record.population.top(BEST_SHOWN)],
        "plan": _plan(record),
        "outcomes": record.population.outcomes,
        "spec": spec.model_dump(mode="json"),
        "device": record.profile.device,
    }


def _verdict(record: SearchRecord) -> str:
    """Return what was gained, in one sentence."""
    summary, count = record.summary, len(record.proposals)
    state = "finished" if record.finished else "not finished"
    of = columns_of(summary)[0].of
    best, uniform = None if summary.best is None else of(summary.best), of(summary.uniform)
    if best is None:
        return f"{state}: no candidate has been measured yet"
    measure = MEASURE_NAMES[record.spec.measure]
    said = f"{state} after {count} candidates: {measure} {_figure(record, best)} (lower is better)"
    if uniform:
        said += f", {best / uniform:.3f} times that of uniform pruning with the same number of parameters"
    allocation = None if summary.best_allocation is None else of(summary.best_allocation)
    if allocation:
        said += f", and {best / allocation:.3f} times that of the best allocation without a search"
    if summary.improved is False:
        said += "; the search has gained nothing" if record.spec.report is None else "; no gain on the report text"
    return said


def _kept(record: SearchRecord) -> str:
    """Return which units the best candidate keeps nearly whole, and which of them the model itself is sensitive to."""
    best, sensitivity = record.population.best(), record.profile.sensitivity
    if best is None:
        return ""
    names = [unit.name for unit in record.profile.shape.units(record.spec.granularity)]
    kept = [i for i, rate in enumerate(best.candidate.rates) if rate < NEARLY_WHOLE]
    if not kept:
        return f"{NEARLY_WHOLE:.0%} or more is removed of every unit."
    said = f"Kept nearly whole (less than {NEARLY_WHOLE:.0%} removed): {_listed([names[i] for i in kept])}."
    most = set(sorted(range(len(sensitivity)), key=lambda i: -sensitivity[i])[: max(1, len(names) // 5)])
    agreed = [names[i] for i in kept if i in most]
    others = [f"{names[i]} ({best.candidate.rates[i]:.0%} removed)" for i in sorted(most - set(kept))]
    if most:
        said += f" Of the {len(most)} most sensitive units, these are among them: {_listed(agreed) or 'none'}; "
        said += f"these are not: {_listed(others) or 'none'}."
    return said


def _listed(names: Sequence[str]) -> str:
    more = len(names) - UNITS_NAMED
    return ", ".join(names[:UNITS_NAMED]) + (f" and {more} more" if more > 0 else "")


def _agents(record: SearchRecord) -> list[dict[str, Any]]:
    """Return what each agent, and each endpoint that it asked, has brought."""
    counts: dict[tuple[str, str, str], dict[str, Any]] = defaultdict(
        lambda: {"measured": 0, "failed": 0, "improved": 0, "best": None}
    )
    best: float | None = None
    for each in record.proposals:
        who = each.candidate.provenance
        found = counts[who.agent, SOURCE_NAMES[who.source], who.endpoint or ""]
        if isinstance(each.outcome, Failed):
            found["failed"] += 1
        if not isinstance(each.outcome, Measured):
            continue
        value = each.outcome.fitness
        found["measured"] += 1
        found["best"] = value if found["best"] is None else min(found["best"], value)
        if best is None or value < best:
            best = value
            found["improved"] += 1
    return [
        {"agent": agent, "source": source, "endpoint": endpoint} | found | {"best": _figure(record, found["best"])}
        for (agent, source, endpoint), found in counts.items()
    ]


def _endpoints(record: SearchRecord) -> dict[str, dict[str, Any]]:
    """Return the state of each endpoint, and what its answers have brought: candidates, and new best ones."""
    brought: dict[str, Counter[str]] = defaultdict(Counter)
    best: dict[str, float] = {}
    for row in _agents(record):
        brought[row["endpoint"]].update(measured=row["measured"], improved=row["improved"])
    for each in record.proposals:
        if isinstance(each.outcome, Measured) and (name := each.candidate.provenance.endpoint):
            best[name] = min(best.get(name, math.inf), each.outcome.fitness)
    return {
        name: each.model_dump()
        | {"state": each.shown_state}
        | {key: brought[name][key] for key in ("measured", "improved")}
        | {"best": _figure(record, best.get(name))}
        for name, each in (record.status.endpoints if record.status else {}).items()
    }


def _candidate(record: SearchRecord, member: Evaluation) -> dict[str, Any]:
    who, outcome = member.candidate.provenance, member.outcome
    assert isinstance(outcome, Measured), "members are measured"
    return {
        "id": member.candidate.id,
        "agent": who.agent,
        "source": SOURCE_NAMES[who.source],
        "endpoint": who.endpoint or "",
        "round": who.round,
        "fitness": _figure(record, outcome.fitness),
        "perplexity": f"{outcome.perplexity:,.2f}",
        "parents": ", ".join(who.parents),
        "rule": who.rule or "",
    }


def _plan(record: SearchRecord) -> list[dict[str, Any]]:
    """Return what each layer keeps in the best candidate, beside what it had."""
    best = record.population.best()
    if best is None:
        return []
    pairs = zip(best.candidate.plan.layers, record.profile.shape.layers, strict=True)
    return [
        {
            "layer": i,
            "heads": f"{kept.query_heads} of {had.query_heads}",
            "kv": f"{kept.kv_heads} of {had.kv_heads}",
            "channels": f"{kept.mlp_channels:,} of {had.mlp_channels:,}",
        }
        for i, (kept, had) in enumerate(pairs)
    ]


def _figure(record: SearchRecord, value: float | None) -> str:
    return "–" if value is None else f"{value:,.{FIGURE_DIGITS[record.spec.measure]}f}"
