"""`selfpruner export`: prune, measure, write the model with a card that says both."""

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gpu_worker.allocation import prepare
from gpu_worker.evaluate import choose_rates, removed_share
from gpu_worker.export.exporting import check_format, export_model
from gpu_worker.export.facts import ExportFacts, TextPerplexity
from gpu_worker.export.folder import check_target
from gpu_worker.progress import Progress, no_progress
from gpu_worker.session import Session
from protocol.allocation import Allocation
from protocol.candidate import Measured
from protocol.card import DensePerplexity
from protocol.formats import Format, GgufType
from protocol.plan import Parameters
from protocol.shape import ModelShape
from protocol.spec import SearchSpec


@dataclass(frozen=True)
class Destination:
    """Where an export goes, and as what. `gguf_type` is for the format gguf alone."""

    folder: Path
    format: Format
    gguf_type: GgufType = "f16"
    force: bool = False


class ExportResult(BaseModel):
    """What was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    format: Format
    files: dict[str, int]
    """Names and sizes in bytes."""
    model: str
    method: str
    rate: float
    """Share of the decoder's parameters that is removed."""
    perplexity: float
    """On the fitness text, of the model in memory."""
    dense_perplexity: float
    report_perplexity: float | None
    parameters: Parameters
    seqlen: int
    tokens: int
    seconds: float
    """That writing took."""


def export_once(
    spec: SearchSpec,
    choice: tuple[float, ...] | Allocation,
    destination: Destination,
    *,
    shape: ModelShape | None = None,
    method: str = "rates",
    progress: Progress = no_progress,
) -> ExportResult:
    """Prune by rates, or by those of an allocation, measure, and write the folder: whole, or not at all.

    Raises UsageError for a model or a text that cannot be had, for rates of the wrong number, range or model, for a
    family that the format does not support, and for a folder that is taken or cannot be written.
    """
    check_target(destination.folder, force=destination.force)
    target = prepare(
        spec,
        choice if isinstance(choice, Allocation) else None,
        progress,
        check=lambda model: check_format(model, destination.format),
    )
    rates = choose_rates(target, choice, shape, progress)
    session = Session(spec, progress, sensitivity=False, target=target)
    plan = spec.plan(list(rates), target.shape)
    # What is pruned last is what is written.
    report = None if spec.report is None else session.evaluate(plan, "report")
    measured = session.evaluate(plan)
    facts = ExportFacts(
        base_model=spec.model,
        method=method,
        rates=rates,
        spec=spec,
        shape=target.shape,
        plan=plan,
        dense=_figure(session.card.dense),
        pruned=_figure(measured),
        dense_report=_figure(session.card.dense_report),
        pruned_report=_figure(report),
    )
    progress("writing", 0, 1)
    start = time.perf_counter()
    export_model(
        target.model,
        plan,
        facts,
        destination.format,
        destination.folder,
        force=destination.force,
        gguf_type=destination.gguf_type,
    )
    progress("writing", 1, 1)
    return ExportResult(
        folder=destination.folder,
        format=destination.format,
        files={file.name: file.stat().st_size for file in sorted(destination.folder.iterdir())},
        model=spec.model,
        method=method,
        rate=removed_share(measured.parameters),
        perplexity=measured.perplexity,
        dense_perplexity=session.card.dense.perplexity,
        report_perplexity=report and report.perplexity,
        parameters=measured.parameters,
        seqlen=spec.fitness.seqlen,
        tokens=measured.tokens,
        seconds=time.perf_counter() - start,
    )


def _figure(measured: Measured | DensePerplexity | None) -> TextPerplexity | None:
    return None if measured is None else TextPerplexity(perplexity=measured.perplexity, tokens=measured.tokens)
