"""The steps of `selfpruner prune` after its search: export, fine-tune, reload. A finished step is not repeated."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from daemon.commands.finetune import RecipeFlags, finetuned, recipe_of
from daemon.commands.output import show_progress
from daemon.commands.request import PruningRequest
from daemon.settings.settings import Settings
from protocol.errors import ModelError, SelfPrunerError
from protocol.plans.shape import ModelShape
from protocol.plans.spec import TextSpec
from protocol.results.commands import ExportResult, FinetuneResult, PruneResult, SearchSummary
from protocol.results.finetuning import Recipe
from protocol.results.formats import FACTS, SAVED_TEXT, Formats, GgufType
from protocol.runtime.files import write_atomically

if TYPE_CHECKING:
    from gpu_worker.models.loading import LoadedModel

BEGUN, WRITTEN = "begun.json", "written.json"
"""Files in the search's folder: the flags of the last call that began to write, and what it wrote."""
REPORT = "prune.json"
"""File in the exported folder: what --json prints."""
FURTHEST_OFF = 0.02
"""Largest relative difference of a folder's perplexity from that in memory; kernels round differently."""


@dataclass(frozen=True)
class Goal:
    """What the command has to produce."""

    out: Path
    formats: Formats
    gguf_type: GgufType = "f16"
    force: bool = False
    data: str | None = None
    """Data for fine-tuning; None for no fine-tuning."""
    minutes: float | None = None
    micro_batch: int | None = None
    """None, here and below, takes the default of `finetune`."""
    batch: int | None = None
    learning_rate: float | None = None


class Written(BaseModel):
    """What was written to the goal's folder, recorded so that a command killed during its checks resumes there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flags: dict[str, str]
    """The flags of the call that wrote it."""
    facts: str
    """SHA-256 of the folder's selfpruner.json, which tells whether another search has replaced it."""
    exported: ExportResult
    finetuned: FinetuneResult | None
    is_checked: bool = False
    """Whether the final checks have ended, passed or not; after that --force starts over."""

    @property
    def perplexity(self) -> float | None:
        """The perplexity in memory before the model was written."""
        if self.finetuned is None:
            return self.exported.perplexity
        measured = self.finetuned.finetuning.perplexity
        return None if measured is None else measured.after


def recipe(goal: Goal, settings: Settings) -> Recipe:
    """Return the recipe for fine-tuning on the goal's data."""
    assert goal.data is not None
    micro_batch = RecipeFlags.micro_batch if goal.micro_batch is None else goal.micro_batch
    flags = RecipeFlags(batch=goal.batch, micro_batch=micro_batch, learning_rate=goal.learning_rate)
    return recipe_of(goal.data, flags, full=False, seed=settings.search.seed)


def written_before(goal: Goal, settings: Settings) -> Written | None:
    """Return what an earlier call with the same flags has written; None if there is nothing to reuse.

    --force replaces a folder that was checked. A command killed before that resumes, so that nothing is trained twice.
    """
    found = _recorded(goal, settings)
    if found is None or (goal.force and found.is_checked):
        return None
    return found if _are_flags_of(goal, found.flags) else None


def holds(folder: Path, request: PruningRequest) -> bool:
    """Whether an exported folder was pruned with the rates of `request`."""
    try:
        return bool(json.loads((folder / FACTS).read_bytes())["rates"] == list(request.choice))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def was_written_unrecorded(goal: Goal, settings: Settings) -> bool:
    """Whether a call with the same flags wrote the goal's folder and was killed before it recorded that."""
    try:
        flags = json.loads((settings.folder / BEGUN).read_bytes())
        facts = json.loads((goal.out / FACTS).read_bytes())
        best = json.loads((settings.folder / "best.json").read_bytes())
        tunings = [(each["recipe"], each["data"]) for each in facts["finetunings"]]
        found = (facts["method"], facts["rates"], facts["formats"], tunings)
        of_search = (f"search {settings.search.name}", best["rates"], list(goal.formats), _tunings(goal, settings))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return _are_flags_of(goal, flags) and found == of_search and _recorded(goal, settings) is None


def _tunings(goal: Goal, settings: Settings) -> list[object]:
    return [] if goal.data is None else [(recipe(goal, settings).model_dump(mode="json"), Path(goal.data).name)]


def _recorded(goal: Goal, settings: Settings) -> Written | None:
    """Return the record of the goal's folder; None if there is none, or the folder has been replaced."""
    try:
        found = Written.model_validate_json((settings.folder / WRITTEN).read_bytes())
        return found if found.facts == _facts(goal) else None
    except (OSError, ValidationError):
        return None


def check_disk(goal: Goal, settings: Settings, shape: ModelShape) -> None:
    """Raise ModelError if the disk is too small for the final export."""
    from gpu_worker.export import disk_space as room

    dtype, rate = settings.target.dtype, settings.target.rate
    if goal.data is None:
        room.check_export_disk(goal.out, rate, shape, goal.formats, dtype, goal.gguf_type)
        return
    from gpu_worker.finetune.checkpoint import check_finetuning_disk, folder_beside

    kept = room.kept_by(rate, shape)
    # The model to fine-tune stays in the search's folder meanwhile, which may be on another disk.
    beside = 0
    if not (_pruned(settings) / FACTS).is_file():
        pruned = room.export_bytes(shape, kept, _trained(goal), dtype)
        room.check_disk(settings.folder, pruned, "the pruned model, before it is fine-tuned,")
        beside = pruned if room.device_of(settings.folder) == room.device_of(goal.out) else 0
    checkpoint = folder_beside(goal.out)
    tuning = recipe(goal, settings)
    check_finetuning_disk(shape, kept, tuning, goal.formats, dtype, checkpoint, goal.gguf_type, beside)


def check_memory(goal: Goal, settings: Settings, bare: "LoadedModel") -> None:
    """Raise ModelError if memory is too small to fine-tune the pruned model; `bare` is the dense one."""
    from gpu_worker.finetune import finetune as finetuning

    spec, tuning = settings.spec(), recipe(goal, settings)
    # A padded model is loaded at full width.
    plan = None if "padded" in goal.formats else spec.uniform_plan(bare.decoder.shape)
    longest = max(text.seqlen for text in spec.texts.values())
    try:
        finetuning.check_memory(bare, plan, tuning, spec.dtype, longest)
    except ModelError as error:
        raise ModelError(f"fine-tuning with --finetune-micro-batch {tuning.micro_batch}: {error}") from error


def write(request: PruningRequest, goal: Goal, settings: Settings, searched: SearchSummary) -> Written:
    """Prune, fine-tune if requested, and write the folder. Raises SelfPrunerError."""
    _keep(settings.folder / BEGUN, json.dumps(_flags_of(goal)))
    if goal.data is None:
        exported, tuned = _export(request, goal, searched), None
    else:
        exported, tuned = _finetuned(request, goal, settings, searched)
    written = Written(flags=_flags_of(goal), facts=_facts(goal), exported=exported, finetuned=tuned)
    _record(written, settings)
    return written


def _record(written: Written, settings: Settings) -> None:
    _keep(settings.folder / WRITTEN, written.model_dump_json())


def _keep(file: Path, text: str) -> None:
    """Write a file for the next call to read. Raises SelfPrunerError."""
    try:
        write_atomically(file, text + "\n")
    except OSError as error:
        raise SelfPrunerError(
            f"{file} cannot be written ({error.strerror}); fix that and run the same command again"
        ) from error


def check_written(
    written: Written, goal: Goal, request: PruningRequest, settings: Settings
) -> tuple[float | None, bool | None]:
    """Return the results of `reloaded` and of `runs_in_llama_cpp`."""
    checked = written.model_copy(update={"is_checked": True})
    try:
        found = reloaded(goal, request, written.perplexity), runs_in_llama_cpp(goal)
    except SelfPrunerError:
        with suppress(SelfPrunerError):  # the original error matters more
            _record(checked, settings)
        raise
    _record(checked, settings)
    return found


def report(result: PruneResult, goal: Goal) -> None:
    """Write the whole result into the folder, unless it is there. Raises SelfPrunerError.

    Models and folders appear by name only, so that no private path is published.
    """
    file = goal.out / REPORT
    if file.exists():  # from an earlier call; another process may be reading it
        return
    record = result.model_dump(mode="json")
    base = json.loads((goal.out / FACTS).read_bytes())["base_model"]
    for part in (record["exported"], record["finetuned"]):
        if part is not None:
            part |= {"folder": Path(part["folder"]).name, "model": base}
    _keep(file, json.dumps(record, indent=2, ensure_ascii=False))


def _trained(goal: Goal) -> Formats:
    """The formats in which a model can be fine-tuned."""
    return tuple(fmt for fmt in goal.formats if fmt != "gguf")


def _facts(goal: Goal) -> str:
    return hashlib.sha256((goal.out / FACTS).read_bytes()).hexdigest()


def _flags_of(goal: Goal) -> dict[str, str]:
    """Return the flags that determine the folder, without --force and those not given."""
    flags = asdict(goal) | {"out": goal.out.absolute()}
    del flags["force"]
    return {name: str(value) for name, value in flags.items() if value is not None}


def _are_flags_of(goal: Goal, recorded: Mapping[str, str]) -> bool:
    # Older versions also recorded flags that were not given.
    return {name: value for name, value in recorded.items() if value != "None"} == _flags_of(goal)


def _export(request: PruningRequest, goal: Goal, searched: SearchSummary) -> ExportResult:
    with show_progress(request.spec.model) as progress:
        from gpu_worker.export.export import Destination, export_once

        return export_once(
            request.spec,
            request.choice,
            Destination(goal.out, goal.formats, goal.gguf_type, goal.force),
            shape=request.shape,
            method=request.method,
            searched=searched,
            progress=progress,
        )


def _finetuned(
    request: PruningRequest, goal: Goal, settings: Settings, searched: SearchSummary
) -> tuple[ExportResult, FinetuneResult]:
    """Export into the search's folder, where a second start finds it, and fine-tune from there into the goal."""
    assert goal.data is not None
    pruned = _pruned(settings)
    exported = _exported_before(request, pruned)
    if exported is None:
        _forget_training(goal, pruned)
        exported = _export(request, Goal(pruned, _trained(goal), force=True), searched)
        _keep(_kept(pruned), exported.model_dump_json())
    from gpu_worker.finetune.eval_texts import EvalText
    from gpu_worker.finetune.finetune import FinetuneRequest
    from gpu_worker.finetune.training import Limits

    def measured(text: TextSpec | None) -> EvalText | None:
        # A pruned model cannot regenerate the dense model's text.
        return None if text is None or text.source == "self" else EvalText(text.source, text.windows, text.seqlen)

    tuning = FinetuneRequest(
        folder=pruned,
        data=goal.data,
        recipe=recipe(goal, settings),
        out=goal.out,
        formats=goal.formats,
        gguf_type=goal.gguf_type if "gguf" in goal.formats else None,
        force=goal.force,
        eval_text=measured(request.spec.fitness),
        report_text=measured(request.spec.report),
        limits=Limits(None if goal.minutes is None else 60 * goal.minutes),
    )
    return exported, finetuned(tuning)


def _forget_training(goal: Goal, pruned: Path) -> None:
    """Remove the checkpoint of a model that this command no longer fine-tunes."""
    from gpu_worker.finetune.checkpoint import Checkpoint, folder_beside, locked

    if _kept(pruned).exists():
        folder = folder_beside(goal.out.resolve())
        with locked(folder):
            Checkpoint(folder, {}).remove()
        _kept(pruned).unlink()


def _pruned(settings: Settings) -> Path:
    """Return the folder of the model before fine-tuning."""
    return settings.folder / "pruned"


def _kept(pruned: Path) -> Path:
    return pruned.with_suffix(".json")


def _exported_before(request: PruningRequest, pruned: Path) -> ExportResult | None:
    """Return an earlier export of these rates, if any; the search may have found better ones since."""
    try:
        exported = ExportResult.model_validate_json(_kept(pruned).read_bytes())
    except (OSError, ValueError):  # pydantic's ValidationError is one
        return None
    return exported if holds(pruned, request) else None


def runs_in_llama_cpp(goal: Goal) -> bool | None:
    """Whether llama.cpp generates with the GGUF file; None without either. Raises ModelError if it fails."""
    if "gguf" not in goal.formats or find_spec("xllamacpp") is None:
        return None
    with show_progress(str(goal.out)):
        from gpu_worker.speed.llama_cpp_engine import check_gguf_runs

        check_gguf_runs(next(goal.out.glob("*.gguf")))
    return True


def reloaded(goal: Goal, request: PruningRequest, wanted: float | None) -> float | None:
    """Return the perplexity of the reloaded folder; None for a GGUF alone, or if none was measured in memory.

    Raises SelfPrunerError if it differs from the perplexity in memory.
    """
    if goal.formats == ("gguf",) or wanted is None:
        return None
    spec, numbers = request.spec, request.spec.text_numbers
    saved_text = goal.out / SAVED_TEXT if spec.fitness.source == "self" else None
    # A text of its own takes no windows from the measured one.
    texts = {role: text for role, text in spec.texts.items() if numbers[role] == numbers["fitness"]}
    with show_progress(str(goal.out)) as progress:
        from gpu_worker.evaluation.one_shot import evaluate_model

        found = evaluate_model(
            str(goal.out),
            texts if saved_text is None else {"fitness": spec.fitness},
            dtype=spec.dtype,
            seed=spec.seed,
            saved_text=saved_text,
            progress=progress,
        ).perplexity
    if abs(found / wanted - 1) > FURTHEST_OFF:
        raise SelfPrunerError(f"{goal.out} measures {found:.4g} where {wanted:.4g} was measured before it was written")
    return found
