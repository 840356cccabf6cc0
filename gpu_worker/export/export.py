"""`selfpruner export`: prunes, measures, and writes the model with its card."""

import math
import time

from gpu_worker.evaluation.allocation import prepare
from gpu_worker.evaluation.one_shot import Pruned, prune_and_measure, removed_share
from gpu_worker.export.disk_space import check_export_disk
from gpu_worker.export.facts import ExportFacts, TextPerplexity
from gpu_worker.export.folder import check_target
from gpu_worker.export.writer import ExportContent, check_formats, export_model
from gpu_worker.measuring.corpora import SELF, windows_digest
from gpu_worker.models.loading import LoadedModel
from gpu_worker.progress import Progress, no_progress
from protocol.plans.allocation import PruningRequest
from protocol.plans.candidate import Measured
from protocol.plans.profile import DensePerplexity, ModelProfile
from protocol.plans.spec import SearchSpec
from protocol.results.commands import ExportResult, SearchSummary
from protocol.results.formats import Destination

SAME_PERPLEXITY = 1e-3
"""Largest relative difference between machines of the dense model's perplexity on the same tokens."""


def export_once(
    request: PruningRequest,
    destination: Destination,
    progress: Progress = no_progress,
    searched: SearchSummary | None = None,
) -> ExportResult:
    """Prune by given rates or an allocation, measure, and write the folder atomically.

    Raises UsageError for a model or text that is not available, for rates of the wrong number, range or model, for a
    family that the format does not support, and for a folder that exists or cannot be written.
    """
    check_target(destination.folder, force=destination.force)
    spec = request.spec
    target = prepare(request, progress, check=lambda model: _check(model, spec, destination))
    pruned = prune_and_measure(target, request.choice, progress)
    start = time.perf_counter()
    facts = facts_of(pruned, request.method, searched and _on_same_tokens(searched, pruned.session.profile))
    content = ExportContent(target.model, facts, target.texts.fitness, saves_windows=spec.fitness.source == SELF)
    gguf = export_model(content, destination, progress)
    seconds = time.perf_counter() - start
    return ExportResult(
        folder=destination.folder,
        formats=destination.formats,
        files={file.name: file.stat().st_size for file in sorted(destination.folder.iterdir())},
        model=spec.model,
        method=request.method,
        rate=removed_share(pruned.fitness.parameters),
        perplexity=pruned.fitness.perplexity,
        dense_perplexity=pruned.session.profile.dense.perplexity,
        kl=pruned.fitness.kl,
        report_perplexity=pruned.report and pruned.report.perplexity,
        parameters=pruned.fitness.parameters,
        seqlen=spec.fitness.seqlen,
        tokens=pruned.fitness.tokens,
        seconds=seconds,
        gguf=gguf,
    )


def _on_same_tokens(searched: SearchSummary, profile: ModelProfile) -> SearchSummary:
    """Return what is known of the search, without uniform pruning on texts that have other tokens here."""
    changes: dict[str, None] = {}
    for name, before, here in (
        ("uniform_perplexity", searched.dense_perplexity, profile.dense),
        ("uniform_report_perplexity", searched.dense_report_perplexity, profile.dense_report),
    ):
        if before is None or here is None or not math.isclose(before, here.perplexity, rel_tol=SAME_PERPLEXITY):
            changes[name] = None
    return searched.model_copy(update=changes)


def _check(model: LoadedModel, spec: SearchSpec, destination: Destination) -> None:
    """Raise ModelError if a format does not support the model, or if the disk has too little space."""
    check_formats(model, destination.formats, destination.gguf_type)
    check_export_disk(destination, spec, model.decoder.shape)


def facts_of(pruned: Pruned, method: str, searched: SearchSummary | None = None) -> ExportFacts:
    """Return the facts of a pruned target for its model card."""
    session = pruned.session
    card, texts = session.profile, session.target.texts
    return ExportFacts(
        base_model=session.spec.model,
        method=method,
        rates=pruned.rates,
        spec=session.spec,
        text_numbers=session.spec.text_numbers,
        shape=session.shape,
        plan=pruned.plan,
        dense=_figure(card.dense),
        pruned=_figure(pruned.fitness),
        dense_report=_figure(card.dense_report),
        pruned_report=_figure(pruned.report),
        fitness_digest=windows_digest(texts.fitness),
        report_digest=None if texts.report is None else windows_digest(texts.report),
        searched=searched,
        begins_with_bos=session.target.model.window_start is not None,
    )


def _figure(measured: Measured | DensePerplexity | None) -> TextPerplexity | None:
    if measured is None:
        return None
    kl = measured.kl if isinstance(measured, Measured) else None
    return TextPerplexity(perplexity=measured.perplexity, tokens=measured.tokens, kl=kl)
