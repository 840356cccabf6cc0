"""What an export says of the search that found its rates: its cost, the uniform baseline and its charts."""

from pathlib import Path

from daemon.monitor.charts import draw_progress, draw_rates
from daemon.monitor.record import SearchRecord
from daemon.monitor.summary import Summary
from protocol.errors import UsageError
from protocol.results.commands import SearchSummary
from protocol.results.formats import SEARCH_CHARTS


def record_of_best(folder: Path, best_id: str) -> SearchRecord | None:
    """Return the record of the search in `folder`; None if it cannot be read, or has another best candidate."""
    try:
        record = SearchRecord.read(folder)
    except (UsageError, OSError):
        return None
    best = record.population.best()
    return record if best is not None and best.candidate.id == best_id else None


def search_summary(summary: Summary, record: SearchRecord | None) -> SearchSummary:
    """Return what an export says of a search, with charts if its record is known."""
    drawings = () if record is None else (draw_progress(record), draw_rates(record))
    return SearchSummary(
        evaluations=sum(summary.candidates["by_outcome"].values()),
        seconds=summary.seconds,
        uniform_perplexity=summary.uniform.perplexity,
        uniform_report_perplexity=summary.uniform.report_perplexity,
        dense_perplexity=summary.dense.perplexity,
        dense_report_perplexity=summary.dense.report_perplexity,
        charts={name: drawing.on_white for name, drawing in zip(SEARCH_CHARTS, drawings, strict=False)},
    )
