"""The steps of `selfpruner prune` around its search: checks, export, fine-tuning, and measuring the reloaded folder.

A step that a killed command has finished is not repeated (prune_records.py).
"""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from gpu_worker.evaluation.texts import check_length, read_texts
from gpu_worker.export import disk_space
from gpu_worker.export.card_measurement import measurement_of
from gpu_worker.export.export import export_once
from gpu_worker.export.folder import check_target
from gpu_worker.export.writer import check_formats
from gpu_worker.finetune.checkpoint import Checkpoint, check_finetuning_disk, folder_beside, locked
from gpu_worker.finetune.data import prepare_data, read_instructions
from gpu_worker.finetune.eval_texts import EvalText
from gpu_worker.finetune.finetune import FinetuneRequest, check_memory, finetune_once
from gpu_worker.finetune.overlap import check_overlap
from gpu_worker.finetune.prune_records import (
    Goal,
    Tuning,
    Written,
    begin,
    holds,
    keep,
    record,
    record_checked,
    was_written_unrecorded,
    written_before,
)
from gpu_worker.finetune.training import Limits
from gpu_worker.llama_cpp.check import check_gguf_runs
from gpu_worker.measuring.corpora import SELF
from gpu_worker.models.loading import LoadedModel, load_without_weights
from gpu_worker.progress import Progress, no_progress
from protocol.errors import ModelError, SelfPrunerError
from protocol.plans.allocation import PruningRequest
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Role, TextSpec
from protocol.results.commands import ExportResult, FinetuneResult, PruneResult, SearchSummary
from protocol.results.formats import FACTS, SAVED_TEXT, Destination, Formats

REPORT = "prune.json"
"""File in the exported folder, with the same content as --json prints."""
FURTHEST_OFF = 0.02
"""Largest allowed relative difference between the perplexity of the reloaded folder and that in memory. The two differ
because kernels round differently."""


@dataclass(frozen=True)
class Finished:
    """The record of the written folder, and the results of its checks, which are None if there is nothing to check."""

    written: Written
    reloaded: float | None
    runs_in_llama_cpp: bool | None


def check_before_search(goal: Goal) -> tuple[Goal, Written | None]:
    """Return the goal, and the record of the folder that an earlier call has written, if any.

    The returned goal may replace the folder if an earlier call wrote it. Raises UsageError for anything that would
    otherwise fail only after hours of search.
    """
    if was_written_unrecorded(goal):
        goal = _replacing(goal)
    before = written_before(goal)
    if before is None:
        check_target(goal.out, force=goal.destination.force)
    model = load_without_weights(goal.spec.model, goal.spec.dtype)
    check_formats(model, goal.destination.formats, goal.destination.gguf_type)
    if before is None:
        check_disk(goal, model.decoder.shape)
    if goal.tuning is not None:
        if before is None:
            _check_memory(goal, goal.tuning, model)
        check_length(model, goal.tuning.recipe.seqlen)
        instructions = read_instructions(goal.tuning.data, goal.tuning.recipe)
        data = prepare_data(goal.tuning.data, instructions, model, goal.tuning.recipe)
        measured: dict[Role, TextSpec | None] = {"fitness": goal.spec.fitness, "report": goal.spec.report}
        for role, text in measured.items():
            if text is not None and text.source != SELF:
                alone = {role: text.model_copy(update={"windows": None})}
                windows = read_texts(model, alone, goal.spec.seed, no_progress)[role]
                check_overlap([example.tokens for example in data.examples], windows, text.source)
    return goal, before


def finish(
    goal: Goal, before: Written | None, request: PruningRequest, searched: SearchSummary, progress: Progress
) -> Finished:
    """Prune, fine-tune if requested, write the folder and check it.

    Only checks the folder if `before` is given and the folder has the rates of `request`. Raises SelfPrunerError.
    """
    if before is not None and not holds(goal.out, request):
        # The search ran longer this time and found better rates: replace the folder that this command wrote before.
        before, goal = None, _replacing(goal)
    written = before or _write(goal, request, searched, progress)
    try:
        reloaded = _reload(goal, request, written.perplexity, progress)
        runs = _runs_in_llama_cpp(goal)
    except SelfPrunerError:
        with suppress(SelfPrunerError):  # the original error matters more
            record_checked(goal, written)
        raise
    record_checked(goal, written)
    return Finished(written, reloaded, runs)


def write_report(result: PruneResult, out: Path) -> None:
    """Write the whole result into the folder, unless it is already there. Raises SelfPrunerError.

    Models and folders appear by name only, so that no private path is published.
    """
    file = out / REPORT
    if file.exists():  # an earlier call wrote it, and another process may be reading it
        return
    content = result.model_dump(mode="json")
    base = json.loads((out / FACTS).read_bytes())["base_model"]
    for part in (content["exported"], content["finetuned"]):
        if part is not None:
            part |= {"folder": Path(part["folder"]).name, "model": base}
    keep(file, json.dumps(content, indent=2, ensure_ascii=False))


def check_disk(goal: Goal, shape: ModelShape) -> None:
    """Raise ModelError if the disk is too small for the final export of a model of this dense `shape`."""
    spec, tuning = goal.spec, goal.tuning
    if tuning is None:
        disk_space.check_export_disk(goal.destination, spec, shape)
        return
    kept = disk_space.kept_by(spec.rate, shape)
    # During fine-tuning, the pruned model stays in the search's folder, which may be on another disk.
    beside = 0
    if not (goal.pruned / FACTS).is_file():
        pruned = disk_space.export_bytes(shape, kept, _trained_formats(goal), spec.dtype)
        disk_space.check_disk(goal.search_folder, pruned, "the pruned model, before it is fine-tuned,")
        beside = pruned if disk_space.device_of(goal.search_folder) == disk_space.device_of(goal.out) else 0
    check_finetuning_disk(shape, kept, tuning.recipe, spec.dtype, goal.destination, beside)


def _check_memory(goal: Goal, tuning: Tuning, bare: LoadedModel) -> None:
    """Raise ModelError if memory is too small to fine-tune the pruned model; `bare` is the dense model."""
    spec = goal.spec
    # A padded model is loaded at full width.
    plan = None if "padded" in goal.destination.formats else spec.uniform_plan(bare.decoder.shape)
    longest = max(text.seqlen for text in spec.texts.values())
    try:
        check_memory(bare, plan, tuning.recipe, spec.dtype, longest)
    except ModelError as error:
        raise ModelError(f"fine-tuning with --finetune-micro-batch {tuning.recipe.micro_batch}: {error}") from error


def _write(goal: Goal, request: PruningRequest, searched: SearchSummary, progress: Progress) -> Written:
    begin(goal)
    if goal.tuning is None:
        return record(goal, export_once(request, goal.destination, progress, searched), None)
    exported = _export_to_tune(goal, request, searched, progress)
    return record(goal, exported, _finetune(goal, goal.tuning, request, progress))


def _export_to_tune(goal: Goal, request: PruningRequest, searched: SearchSummary, progress: Progress) -> ExportResult:
    """Export into the search's folder, where a restarted command finds the model."""
    kept = goal.pruned.with_suffix(".json")
    try:
        exported = ExportResult.model_validate_json(kept.read_bytes())
    except (OSError, ValueError):  # ValidationError is a ValueError
        exported = None
    # The search may have found better rates since the last export.
    if exported is None or not holds(goal.pruned, request):
        if kept.exists():
            _forget_training(goal)
            kept.unlink()
        exported = export_once(
            request, Destination(goal.pruned, _trained_formats(goal), force=True), progress, searched
        )
        keep(kept, exported.model_dump_json())
    return exported


def _forget_training(goal: Goal) -> None:
    """Remove the checkpoint of a model that this command no longer fine-tunes."""
    folder = folder_beside(goal.out.resolve())
    with locked(folder):
        Checkpoint(folder, {}).remove()


def _finetune(goal: Goal, tuning: Tuning, request: PruningRequest, progress: Progress) -> FinetuneResult:
    """Fine-tune the model in the search's folder, and write the goal's folder."""

    def measured(text: TextSpec | None) -> EvalText | None:
        # A pruned model cannot regenerate the dense model's text.
        return None if text is None or text.source == "self" else EvalText(text.source, text.windows, text.seqlen)

    destination = goal.destination
    asked = FinetuneRequest(
        folder=goal.pruned,
        data=tuning.data,
        recipe=tuning.recipe,
        out=goal.out,
        teacher=goal.spec.model if tuning.recipe.distilled else None,
        formats=destination.formats,
        gguf_type=destination.gguf_type if "gguf" in destination.formats else None,
        force=destination.force,
        eval_text=measured(request.spec.fitness),
        report_text=measured(request.spec.report),
        limits=Limits(None if tuning.minutes is None else 60 * tuning.minutes),
    )
    return finetune_once(asked, progress)


def _reload(goal: Goal, request: PruningRequest, wanted: float | None, progress: Progress) -> float | None:
    """Return the perplexity of the reloaded folder.

    Returns None if the folder holds only a GGUF file, and if no perplexity was measured in memory. Raises
    SelfPrunerError if the two perplexities differ.
    """
    if goal.destination.formats == ("gguf",) or wanted is None:
        return None
    spec = request.spec
    saved_text = goal.out / SAVED_TEXT if spec.fitness.source == "self" else None
    found = measurement_of(spec, spec.text_numbers, saved_text).run(str(goal.out), progress).perplexity
    if abs(found / wanted - 1) > FURTHEST_OFF:
        raise SelfPrunerError(f"{goal.out} measures {found:.4g} where {wanted:.4g} was measured before it was written")
    return found


def _runs_in_llama_cpp(goal: Goal) -> bool | None:
    """Return True if llama.cpp generates text with the GGUF file; None if the file or llama.cpp is missing.

    Raises ModelError if llama.cpp fails.
    """
    if "gguf" not in goal.destination.formats or find_spec("xllamacpp") is None:
        return None
    check_gguf_runs(next(goal.out.glob("*.gguf")))
    return True


def _trained_formats(goal: Goal) -> Formats:
    """Return the requested formats in which a model can be fine-tuned."""
    return tuple(fmt for fmt in goal.destination.formats if fmt != "gguf")


def _replacing(goal: Goal) -> Goal:
    return replace(goal, destination=replace(goal.destination, force=True))
