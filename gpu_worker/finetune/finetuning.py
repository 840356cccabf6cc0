"""`selfpruner finetune`: load an exported folder, train, merge, measure, write it again."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from gpu_worker.corpora import load_roles, windows_digest
from gpu_worker.export.exporting import check_formats
from gpu_worker.export.facts import ExportFacts, TextPerplexity, without_places
from gpu_worker.export.folder import check_target
from gpu_worker.export.kept_text import read_kept_text
from gpu_worker.export.reopen import Exported, as_it_was_pruned, read_exported
from gpu_worker.finetune.checkpoint import Checkpoint, State, folder_beside
from gpu_worker.finetune.data import TrainingData, prepare_data, read_instructions
from gpu_worker.finetune.memory import Training, check_finetuning_disk
from gpu_worker.finetune.output import Output, write_output
from gpu_worker.finetune.trained import trained
from gpu_worker.finetune.training import Limits, mean_losses, steps_of, train
from gpu_worker.identity import folder_identity
from gpu_worker.memory import Workload
from gpu_worker.models import LoadedModel, load_model
from gpu_worker.perplexity import checked_perplexity
from gpu_worker.progress import Progress, no_progress
from gpu_worker.target import check_length
from protocol.errors import SettingsError
from protocol.finetuning import Finetuning, Perplexities, Recipe, form_of
from protocol.formats import Formats, GgufType
from protocol.results import FinetuneResult
from protocol.spec import Dtype, Role, TextSpec


@dataclass(frozen=True)
class EvalText:
    """The text that perplexities before and after are of; sizes that are None are those of the folder's card."""

    source: str
    windows: int | None = None
    seqlen: int | None = None


@dataclass(frozen=True)
class FinetuneRequest:
    """What `selfpruner finetune` is asked for."""

    folder: Path
    data: str
    recipe: Recipe
    out: Path
    formats: Formats = ()
    """Empty: the one of `folder`."""
    gguf_type: GgufType = "f16"
    force: bool = False
    eval_text: EvalText | None = None
    """None: the text that the folder keeps, where it keeps one."""
    dtype: Dtype | None = None
    """None: that of the folder's card."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class _Measured:
    """A text by which fine-tuning is judged, and its tokens."""

    text: TextSpec
    windows: Tensor
    kept: bool
    """Whether they come with the folder."""


def finetune_once(request: FinetuneRequest, progress: Progress = no_progress) -> FinetuneResult:
    """Fine-tune an exported folder and write it anew: whole, or not at all. Goes on from a checkpoint beside `out`.

    Raises UsageError for a folder, data or text that cannot be had, an output that cannot be written, too little memory
    or disk, and a checkpoint of something else; NotFiniteError where the loss is no number.
    """
    out = request.out.expanduser().resolve()
    check_target(out, force=request.force)
    exported = read_exported(request.folder)
    recipe, formats = request.recipe, request.formats or exported.formats
    dtype = _dtype(request, exported)
    instructions = read_instructions(request.data, recipe) if form_of(request.data) == "alpaca" else None
    stays = exported.facts.parameters.decoder_after
    check_finetuning_disk(exported.facts.shape, stays, recipe, formats, dtype, folder_beside(out), request.gguf_type)
    model = _load(request, exported, dtype, progress)
    check_formats(model, formats, request.gguf_type)
    data = prepare_data(request.data, instructions, model, recipe)
    measured = _text_to_measure(request, exported, model)
    checkpoint = Checkpoint(folder_beside(out), _decisive(request, recipe, data, dtype))
    start = checkpoint.read() or State([], {})
    before = _perplexity(model, measured, progress, "measuring before")
    with trained(model, recipe) as parameters:
        state = train(model, parameters, data, recipe, request.limits, checkpoint, start, progress)
        count = parameters.count
    after = _perplexity(model, measured, progress, "measuring after")
    tuned = _told(recipe, data, state, count, measured, before, after)
    facts = _facts(exported.facts, tuned, measured, after, dtype)
    kept = None if measured is None or not measured.kept else measured.windows
    files = write_output(model, facts, Output(out, formats, request.gguf_type, request.force, kept), state, progress)
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
    )


def _dtype(request: FinetuneRequest, exported: Exported) -> Dtype:
    dtype = request.dtype or exported.facts.spec.dtype
    if dtype == "float16":
        raise SettingsError("gradients overflow in float16: give --dtype bfloat16 or float32")
    return dtype


def _load(request: FinetuneRequest, exported: Exported, dtype: Dtype, progress: Progress) -> LoadedModel:
    progress("loading model", 0, 1)
    measured = request.eval_text and (request.eval_text.seqlen or exported.facts.spec.fitness.seqlen)
    longest = max(request.recipe.seqlen, measured or 0)
    model = load_model(str(request.folder), dtype, Workload(longest, training=Training(request.recipe)))
    check_length(model, longest)
    as_it_was_pruned(model, exported)
    progress("loading model", 1, 1)
    return model


def _decisive(request: FinetuneRequest, recipe: Recipe, data: TrainingData, dtype: Dtype) -> dict[str, object]:
    """What a checkpoint has to agree with, by its name for people."""
    return {
        "model": folder_identity(request.folder)[:16],
        "data": data.digest[:16],
        "dtype": dtype,
        **recipe.model_dump(mode="json"),
    }


def _text_to_measure(request: FinetuneRequest, exported: Exported, model: LoadedModel) -> _Measured | None:
    """The text that was asked for, dealt out as for an export, so that windows it was pruned by stay out of it.

    `selfpruner evaluate` deals it out the same way from what the card says.
    """
    spec, asked = exported.facts.spec, request.eval_text
    if asked is None:
        if exported.kept_text is None:
            return None
        windows = read_kept_text(exported.kept_text, spec.fitness, model.decoder.head.out_features)
        return _Measured(spec.fitness, windows, kept=True)
    windows_asked = spec.fitness.windows if asked.windows is None else asked.windows
    text = TextSpec(source=asked.source, windows=windows_asked, seqlen=asked.seqlen or spec.fitness.seqlen)
    texts: dict[Role, TextSpec] = {"fitness": text}
    if spec.calibration.source == Path(asked.source).name:
        texts = {"calibration": spec.calibration.model_copy(update={"source": asked.source}), "fitness": text}
    loaded = load_roles(texts, spec.seed, model.tokenizer, _not_written, model.window_start, {"fitness"})
    return _Measured(text, loaded["fitness"], kept=False)


def _not_written(_windows: int, _length: int) -> Tensor:
    raise SettingsError(
        "a pruned model's own text is no measure of it: give --eval-data, a text file, `wikitext2` or `c4`"
    )


def _perplexity(model: LoadedModel, measured: _Measured | None, progress: Progress, stage: str) -> float | None:
    return None if measured is None else checked_perplexity(model.decoder, measured.windows, progress, stage)[0]


def _told(
    recipe: Recipe,
    data: TrainingData,
    state: State,
    trained_parameters: int,
    measured: _Measured | None,
    before: float | None,
    after: float | None,
) -> Finetuning:
    first, last = mean_losses(state.losses)
    perplexity = None
    if measured is not None and before is not None and after is not None:
        text = measured.text.model_copy(update={"source": Path(measured.text.source).name})
        perplexity = Perplexities(text=text, before=before, after=after, tokens=_predicted(measured))
    return Finetuning(
        recipe=recipe,
        data=data.name,
        form=data.form,
        examples=len(data.examples),
        steps=len(state.losses),
        tokens=sum(point.tokens for point in state.losses),
        trained_parameters=trained_parameters,
        first_loss=first,
        last_loss=last,
        perplexity=perplexity,
    )


def _predicted(measured: _Measured) -> int:
    return measured.windows.shape[0] * (measured.windows.shape[1] - 1)


def _facts(
    facts: ExportFacts, tuned: Finetuning, measured: _Measured | None, after: float | None, dtype: Dtype
) -> ExportFacts:
    """What the new folder says: what was measured before is no longer true, but of the dense model."""
    changes: dict[str, object] = {
        "finetunings": (*facts.finetunings, tuned),
        "pruned": None,
        "pruned_report": None,
    }
    if measured is not None and after is not None:
        digest = windows_digest(measured.windows)
        spec = facts.spec.model_copy(update={"fitness": measured.text, "report": None, "dtype": dtype})
        changes |= {
            "spec": without_places(spec),
            "pruned": TextPerplexity(perplexity=after, tokens=_predicted(measured)),
            "dense": facts.dense if digest == facts.fitness_digest else None,
            "dense_report": None,
            "fitness_digest": digest,
        }
    return facts.model_copy(update=changes)
