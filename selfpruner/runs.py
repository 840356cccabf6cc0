"""What a search has found, read from its folder."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.population.population import Evaluation
from daemon.monitor.status import Status
from daemon.monitor.summary import Summary
from daemon.state.history import History
from daemon.state.journal import BEST, STATUS_FILE, saved, saved_spec
from daemon.state.recovery import recovered
from protocol.errors import UsageError
from protocol.plans.candidate import Failed, Measured
from protocol.plans.spec import MEASURE_NAMES, SearchSpec
from protocol.results.commands import ExportResult
from protocol.results.formats import Destination, GgufType, formats_of, gguf_type_of
from protocol.runtime import logs
from protocol.runtime.paths import expanded

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes


class Run:
    """A search in its folder, finished or not. What it says is what the folder held when this object was made."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded(folder)
        spec = saved_spec(self.folder) if self.folder.is_dir() else None
        if spec is None:
            raise UsageError(f"there is no search in the folder {str(folder)!r}")
        self.spec: SearchSpec = spec
        """Model, texts and way of pruning."""
        found = recovered(self.folder, spec, History())
        self.evaluations: list[Evaluation] = [] if found is None else list(found.population)
        """Each candidate with its outcome, in the order of outcomes; also uniform pruning and measurements on the
        report text."""

    def __repr__(self) -> str:
        return f"<Run {str(self.folder)!r}: {len(self.proposals)} candidates of {self.spec.model}>"

    @property
    def proposals(self) -> list[Evaluation]:
        """Return the candidates of the search itself, without baselines and report."""
        return [each for each in self.evaluations if each.candidate.is_proposal]

    @property
    def best(self) -> Evaluation | None:
        """Return the best candidate, None if there is none."""
        measured = [each for each in self.proposals if isinstance(each.outcome, Measured)]
        return min(measured, key=_fitness, default=None)

    @property
    def rates(self) -> tuple[float, ...]:
        """Return the pruning rates of the best candidate, one per unit."""
        return self.best.candidate.rates if self.best else ()

    @property
    def uniform(self) -> Measured | None:
        """Return the outcome of uniform pruning on the fitness text."""
        for each in self.evaluations:
            if not each.candidate.is_proposal and each.candidate.text == "fitness":
                return each.outcome if isinstance(each.outcome, Measured) else None
        return None

    @cached_property
    def summary(self) -> Summary | None:
        """The summary of a search that has ended, None before."""
        record = saved(self.folder, "summary.json")
        return None if record is None else Summary.model_validate({k: v for k, v in record.items() if k != "improved"})

    @cached_property
    def status(self) -> Status | None:
        """The last status that the search wrote."""
        record = saved(self.folder, STATUS_FILE)
        return None if record is None else Status.model_validate(record)

    def frame(self) -> "pandas.DataFrame":
        """Return a pandas frame with a row per evaluation, in the order of outcomes."""
        import pandas

        rows = [_row(each) for each in self.evaluations]
        return pandas.DataFrame(rows).set_index("order", drop=False) if rows else pandas.DataFrame(columns=["order"])

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw each candidate's fitness and the best so far against the number of evaluations, beside uniform pruning.

        Needs matplotlib (`pip install 'self-pruner[plots]'`). Returns the axes.
        """
        from matplotlib import pyplot

        drawn = pyplot.subplots(figsize=(7, 4))[1] if axes is None else axes
        measured = [(i, _fitness(e)) for i, e in enumerate(self.proposals, 1) if isinstance(e.outcome, Measured)]
        if measured:
            numbers, values = zip(*measured, strict=True)
            best = [min(values[: i + 1]) for i in range(len(values))]
            drawn.scatter(numbers, values, s=12, color="#9a9a9a", label="candidates")
            drawn.step(numbers, best, where="post", color="#0072b2", label="best so far")
        if self.uniform is not None:
            drawn.axhline(self.uniform.fitness, color="#d55e00", linestyle="--", label="uniform")
        drawn.set_xlabel("evaluations")
        drawn.set_ylabel(f"{MEASURE_NAMES[self.spec.measure]} on the fitness text")
        drawn.set_title(f"{Path(self.spec.model).name}, {self.spec.rate:.0%} removed")
        drawn.legend()
        return drawn

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


def _fitness(each: Evaluation) -> float:
    assert isinstance(each.outcome, Measured)
    return each.outcome.fitness


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
