"""What an export says of the search that found its rates: its cost, the uniform baseline and its charts."""

from collections.abc import Sequence
from pathlib import Path

from daemon.monitor.charts import draw_progress, draw_rates
from daemon.monitor.record import SearchRecord
from daemon.monitor.summary import Summary
from protocol.errors import UsageError
from protocol.results.commands import SearchSummary
from protocol.results.formats import SEARCH_CHARTS


def record_of_best(folder: Path, rates: Sequence[float]) -> SearchRecord | None:
    """Return the record of the search in `folder`; None if it has none, or if its best candidate has other rates."""
    try:
        record = SearchRecord.read(folder)
    except UsageError:
        return None
    best = record.population.best()
    return record if best is not None and best.candidate.rates == tuple(rates) else None


def search_summary(summary: Summary, record: SearchRecord | None) -> SearchSummary:
    """Return what an export says of a search, with charts if its record is known."""
    drawings = () if record is None else (draw_progress(record), draw_rates(record))
    return SearchSummary(
        evaluations=sum(summary.candidates["by_outcome"].values()),
        seconds=summary.seconds,
        uniform_perplexity=summary.uniform.perplexity,
        uniform_report_perplexity=summary.uniform.report_perplexity,
        charts={name: drawing.on_white for name, drawing in zip(SEARCH_CHARTS, drawings, strict=False)},
    )
