"""`selfpruner finetune`: loads an exported folder, trains, merges, measures, and writes a new folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from gpu_worker.evaluation.texts import check_length
from gpu_worker.export.exported_folder import ExportedFolder, pruned_sizes, read_exported, restore_pruned_sizes
from gpu_worker.export.facts import ExportFacts, TextPerplexity, without_folders
from gpu_worker.export.folder import check_target
from gpu_worker.export.writer import ExportContent, check_formats
from gpu_worker.finetune.checkpoint import Checkpoint, State, check_finetuning_disk, folder_beside, locked
from gpu_worker.finetune.data import TrainingData, prepare_data, read_instructions
from gpu_worker.finetune.eval_texts import (
    EvalText,
    EvalTokens,
    load_eval_texts,
    measure,
    perplexity_changes,
    requested_texts,
    shared_text_numbers,
)
from gpu_worker.finetune.loss import Teacher
from gpu_worker.finetune.output import write_output
from gpu_worker.finetune.overlap import check_overlap
from gpu_worker.finetune.trainable import trained
from gpu_worker.finetune.training import Limits, TrainingSetup, mean_losses, steps_of, train
from gpu_worker.measuring.corpora import windows_digest
from gpu_worker.measuring.half_precision import warn_if_slow
from gpu_worker.models.identity import folder_identity
from gpu_worker.models.loading import LoadedModel, load_model, load_without_weights
from gpu_worker.models.machine import this_machine
from gpu_worker.models.memory import Training, Workload, estimate_memory
from gpu_worker.models.placement import place
from gpu_worker.progress import Progress, no_progress
from protocol.errors import ModelError, SettingsError
from protocol.plans.plan import Plan
from protocol.plans.spec import Dtype, Role
from protocol.results.commands import FinetuneResult, SearchSummary
from protocol.results.finetuning import Finetuning, Perplexities, Recipe
from protocol.results.formats import Destination, Formats, GgufType, gguf_type_of


@dataclass(frozen=True)
class FinetuneRequest:
    """The arguments of `selfpruner finetune`."""

    folder: Path
    data: str
    recipe: Recipe
    out: Path
    teacher: str | None = None
    """The model whose predictions are learnt, if the recipe distils: usually the dense one."""
    formats: Formats = ()
    """Formats to write. Empty: the formats of `folder`."""
    gguf_type: GgufType | None = None
    """Type of the GGUF file, if one is written; None: f16."""
    force: bool = False
    eval_text: EvalText | None = None
    """Text to measure. None: the text that is saved in the folder, if any."""
    report_text: EvalText | None = None
    """A second text to measure."""
    dtype: Dtype | None = None
    """Dtype of the model. None: the dtype in the folder's card."""
    limits: Limits = field(default_factory=Limits)

    @property
    def asked(self) -> dict[Role, EvalText]:
        """Return the requested evaluation texts."""
        given: dict[Role, EvalText | None] = {"fitness": self.eval_text, "report": self.report_text}
        return {role: text for role, text in given.items() if text is not None}


def finetune_once(request: FinetuneRequest, progress: Progress = no_progress) -> FinetuneResult:
    """Fine-tune an exported folder and write a new folder atomically. Resumes from a checkpoint beside `out`.

    Raises UsageError for a folder, data or text that is not available, a text that is measured and trained on, an
    output that cannot be written, too little memory or disk, and a checkpoint that does not match or is locked;
    NotFiniteError if the loss is not finite.
    """
    out = request.out.expanduser().resolve()
    check_target(out, force=request.force)
    exported = read_exported(request.folder)
    assert (request.recipe.distilled > 0) == (request.teacher is not None)
    recipe, formats, dtype = request.recipe, request.formats or exported.formats, _dtype(request, exported)
    destination = Destination(out, formats, gguf_type_of(formats, request.gguf_type), request.force)
    instructions = read_instructions(request.data, recipe)
    stays = exported.facts.parameters.decoder_after
    check_finetuning_disk(exported.facts.shape, stays, recipe, dtype, destination)
    with locked(folder_beside(out)):
        model = _load(request, exported, dtype, progress)
        taught_by = None if request.teacher is None else _load_teacher(request.teacher, model, recipe, dtype, progress)
        teacher = None if taught_by is None else Teacher(taught_by.decoder, recipe.distilled)
        check_formats(model, formats, destination.gguf_type)
        data = prepare_data(request.data, instructions, model, recipe)
        eval_tokens = load_eval_texts(exported, model, request.asked)
        for each in eval_tokens.values():
            check_overlap([example.tokens for example in data.examples], each.windows, each.text.source)
        checkpoint = Checkpoint(folder_beside(out), _decisive(request, taught_by, data, dtype))
        start = checkpoint.read() or State([], {})
        before = measure(model, eval_tokens, progress, "measuring before")
        with trained(model, recipe) as parameters:
            setup = TrainingSetup(model, parameters, data, recipe, request.limits, teacher)
            state = train(setup, checkpoint, start, progress)
            count = parameters.count
        del teacher, taught_by, setup  # the memory is needed to measure and to write
        after = measure(model, eval_tokens, progress, "measuring after")
        tuned = _finetuning(request, data, state, count, perplexity_changes(eval_tokens, before, after))
        facts = _facts(exported.facts, tuned, eval_tokens, dtype)
        measured = next(iter(eval_tokens.values()), None)  # the fitness text, if there is one
        content = ExportContent(model, facts)
        if measured is not None:
            content = replace(content, windows=measured.windows, saves_windows=measured.kept)
        files, gguf = write_output(content, destination, state, progress)
        checkpoint.remove()
    return FinetuneResult(
        folder=out,
        formats=formats,
        files=files,
        model=facts.base_name,
        parameters=facts.parameters,
        finetuning=tuned,
        resumed_from=len(start.losses),
        ended_by="steps" if len(state.losses) >= steps_of(recipe, len(data.examples)) else "time",
        seconds=state.seconds,
        gguf=gguf,
    )


def check_memory(bare: LoadedModel, plan: Plan | None, recipe: Recipe, dtype: Dtype, longest: int) -> None:
    """Raise ModelError if this machine has too little memory to fine-tune `bare`, pruned to `plan` if one is given.

    `bare` has no weights yet; `longest` is the length in tokens of the longest window that will be measured.
    """
    shape = bare.decoder.shape
    pruned = shape if plan is None else shape.model_copy(update={"layers": pruned_sizes(plan)})
    kind = getattr(torch, dtype)
    teacher = shape.total_parameters * kind.itemsize if recipe.distilled else 0
    workload = Workload(max(recipe.seqlen, longest), training=Training(recipe, teacher))
    machine = this_machine()
    decoder = replace(bare.decoder, shape=pruned)
    place(estimate_memory(decoder, kind, workload, machine.device), machine)


def _dtype(request: FinetuneRequest, exported: ExportedFolder) -> Dtype:
    dtype = request.dtype or exported.facts.spec.dtype
    if dtype == "float16":
        raise SettingsError("gradients overflow in float16: give --dtype bfloat16 or float32")
    return dtype


def _load(request: FinetuneRequest, exported: ExportedFolder, dtype: Dtype, progress: Progress) -> LoadedModel:
    progress("loading model", 0, 1)
    measured = requested_texts(exported.facts.spec, request.asked).values()
    longest = max([request.recipe.seqlen, *(text.seqlen for text in measured)])
    teacher = 0
    if request.teacher is not None:
        shape = load_without_weights(request.teacher, dtype).decoder.shape
        teacher = shape.total_parameters * getattr(torch, dtype).itemsize
    model = load_model(str(request.folder), dtype, Workload(longest, training=Training(request.recipe, teacher)))
    check_length(model, longest)
    restore_pruned_sizes(model, exported)
    warn_if_slow(dtype, model.device, "training is nearly twice as fast")
    progress("loading model", 1, 1)
    return model


def _load_teacher(teacher: str, model: LoadedModel, recipe: Recipe, dtype: Dtype, progress: Progress) -> LoadedModel:
    """Load the model whose predictions `model` learns. Raises ModelError if they predict other tokens."""
    progress("loading the teacher", 0, 1)
    found = load_model(teacher, dtype, Workload(recipe.seqlen))
    check_length(found, recipe.seqlen)
    theirs, mine = found.decoder.head.out_features, model.decoder.head.out_features
    if theirs != mine or found.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise ModelError(f"{teacher!r} cannot teach this model: it has another vocabulary")
    progress("loading the teacher", 1, 1)
    return found


def _decisive(
    request: FinetuneRequest, teacher: LoadedModel | None, data: TrainingData, dtype: Dtype
) -> dict[str, object]:
    """Return the settings that a checkpoint must match, by the names that messages use."""
    return {
        "model": folder_identity(request.folder)[:16],
        "data": data.digest[:16],
        "teacher": None if teacher is None else teacher.identity[:16],
        "dtype": dtype,
        **request.recipe.model_dump(mode="json"),
    }


def _finetuning(
    request: FinetuneRequest,
    data: TrainingData,
    state: State,
    trained_parameters: int,
    perplexities: Mapping[Role, Perplexities],
) -> Finetuning:
    first, last = mean_losses(state.losses)
    return Finetuning(
        recipe=request.recipe,
        data=data.name,
        form=data.form,
        teacher=request.teacher and (Path(request.teacher).name or Path(request.teacher).resolve().name),
        examples=len(data.examples),
        steps=len(state.losses),
        tokens=sum(point.tokens for point in state.losses),
        trained_parameters=trained_parameters,
        first_loss=first,
        last_loss=last,
        perplexity=perplexities.get("fitness"),
        report_perplexity=perplexities.get("report"),
    )


def _facts(facts: ExportFacts, tuned: Finetuning, eval_tokens: Mapping[Role, EvalTokens], dtype: Dtype) -> ExportFacts:
    """Return the new folder's facts. Drop old measurements, except those of the dense model on the same tokens."""
    changes: dict[str, object] = {
        "finetunings": (*facts.finetunings, tuned),
        "pruned": None,
        "pruned_report": None,
    }
    spec = facts.spec.model_copy(update={"dtype": dtype}) if eval_tokens else facts.spec
    if "fitness" in eval_tokens and tuned.perplexity is not None:
        digest = windows_digest(eval_tokens["fitness"].windows)
        spec = spec.model_copy(update={"fitness": eval_tokens["fitness"].text, "report": None})
        changes |= {
            "pruned": _figure(tuned.perplexity),
            "dense": facts.dense if digest == facts.fitness_digest else None,
            "dense_report": None,
            "fitness_digest": digest,
            "report_digest": None,
        }
    if "report" in eval_tokens and tuned.report_perplexity is not None:
        digest = windows_digest(eval_tokens["report"].windows)
        spec = spec.model_copy(update={"report": eval_tokens["report"].text})
        changes |= {
            "pruned_report": _figure(tuned.report_perplexity),
            "dense_report": facts.dense_report if digest == facts.report_digest else None,
            "report_digest": digest,
        }
    if eval_tokens:
        changes |= {"text_numbers": shared_text_numbers(facts, eval_tokens)}
        spec = without_folders(spec)
    new = facts.model_copy(update=changes | {"spec": spec})
    return new.model_copy(update={"searched": _still_valid(facts, new)})


def _still_valid(facts: ExportFacts, new: ExportFacts) -> SearchSummary | None:
    """Return the search results; uniform pruning's perplexities are kept only if they are for the same tokens."""
    if facts.searched is None:
        return None
    changes: dict[str, None] = {}
    if new.fitness_digest != facts.fitness_digest:
        changes["uniform_perplexity"] = None
    if new.report_digest != facts.report_digest:
        changes["uniform_report_perplexity"] = None
    return facts.searched.model_copy(update=changes)


def _figure(perplexity: Perplexities) -> TextPerplexity:
    return TextPerplexity(perplexity=perplexity.after, tokens=perplexity.tokens)
