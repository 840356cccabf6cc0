"""What a search has found, read from its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.population.population import Evaluation
from daemon.monitor.charts import draw_population, draw_progress, draw_rates
from daemon.monitor.drawing import Drawing
from daemon.monitor.record import SearchRecord
from daemon.monitor.report import save_report
from daemon.monitor.status import Status
from daemon.monitor.summary import Summary
from daemon.state.journal import BEST, saved
from protocol.errors import UsageError
from protocol.plans.candidate import Failed, Measured
from protocol.results.commands import ExportResult
from protocol.results.formats import Destination, GgufType, formats_of, gguf_type_of
from protocol.runtime import logs
from protocol.runtime.paths import expanded

if TYPE_CHECKING:
    import pandas


class Run:
    """A search in its folder, finished or not. What it says is what the folder held when this object was made."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded(folder)
        self._record = SearchRecord.read(self.folder)
        self.spec = self._record.spec
        """Model, texts and way of pruning."""
        self.evaluations = list(self._record.population)
        """Each candidate with its outcome, in the order of outcomes; also uniform pruning and measurements on the
        report text."""

    def __repr__(self) -> str:
        return f"<Run {str(self.folder)!r}: {len(self.proposals)} candidates of {self.spec.model}>"

    @property
    def proposals(self) -> list[Evaluation]:
        """Return the candidates of the search itself, without baselines and report."""
        return self._record.proposals

    @property
    def best(self) -> Evaluation | None:
        """Return the best candidate, None if there is none."""
        return self._record.population.best()

    @property
    def rates(self) -> tuple[float, ...]:
        """Return the pruning rates of the best candidate, one per unit."""
        return self.best.candidate.rates if self.best else ()

    @property
    def uniform(self) -> Measured | None:
        """Return the outcome of uniform pruning on the fitness text."""
        return self._record.uniform

    @property
    def summary(self) -> Summary:
        """Return the figures of the dense model, of uniform pruning, and of the best candidates."""
        return self._record.summary

    @property
    def status(self) -> Status | None:
        """Return the last status that the search wrote."""
        return self._record.status

    def frame(self) -> "pandas.DataFrame":
        """Return a pandas frame with a row per evaluation, in the order of outcomes."""
        import pandas

        rows = [_row(each) for each in self.evaluations]
        return pandas.DataFrame(rows).set_index("order", drop=False) if rows else pandas.DataFrame(columns=["order"])

    def plot(self) -> Drawing:
        """Draw each candidate and the best so far against the number of evaluations, beside uniform pruning."""
        return draw_progress(self._record)

    def plot_rates(self) -> Drawing:
        """Draw the rates of the best candidate over the depth of the model, above the sensitivity of each unit."""
        return draw_rates(self._record)

    def plot_population(self) -> Drawing:
        """Draw the rates of the best candidates as a map, the best one on top."""
        return draw_population(self._record)

    def report(self, out: str | Path) -> Path:
        """Write the search's report, one HTML file that needs no network, as `selfpruner report` does."""
        file = expanded(Path(out))
        save_report([self._record], file)
        return file

    def export(
        self,
        out: str | Path,
        *,
        formats: Sequence[str] = ("hf",),
        gguf_type: GgufType | None = None,
        force: bool = False,
    ) -> ExportResult:
        """Export the best candidate's model to the folder `out`, as `selfpruner export --search` does."""
        from daemon.commands.request import request_of_search
        from gpu_worker.export.export import export_once
        from gpu_worker.export.folder import check_target
        from gpu_worker.measuring.half_precision import products_in_float32

        record = saved(self.folder, BEST)
        if record is None:
            raise UsageError(f"the search in {self.folder} has no best candidate yet")
        named = formats_of(list(formats))
        destination = Destination(expanded(out), named, gguf_type_of(named, gguf_type), force)
        check_target(destination.folder, force=force)
        with logs.silent(), products_in_float32():
            return export_once(request_of_search(record, f"search {record['search']}"), destination)


def run(folder: str | Path) -> Run:
    """Return the search in `folder`, such as `runs/quickstart`. Raises UsageError if there is none."""
    return Run(folder)


def _row(each: Evaluation) -> dict[str, Any]:
    candidate, outcome = each.candidate, each.outcome
    who = candidate.provenance
    row = {
        "order": each.order,
        "id": candidate.id,
        "text": candidate.text,
        "outcome": outcome.kind,
        "agent": who.agent,
        "source": who.source,
        "round": who.round,
        "step": who.step,
        "endpoint": who.endpoint,
        "rule": who.rule,
        "parents": who.parents,
        "rates": candidate.rates,
    }
    if isinstance(outcome, Failed):
        return row | {"reason": outcome.reason}
    return row | {
        "perplexity": outcome.perplexity,
        "kl": outcome.kl,
        "fitness": outcome.fitness if isinstance(outcome, Measured) else None,
        "parameters": outcome.parameters.decoder_after,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
    }
