"""`selfpruner allocate | evaluate | export`: pruning without a search, or after one."""

import asyncio
from pathlib import Path
from typing import Annotated

import structlog
import typer

from daemon.commands import flags
from daemon.commands import tables as answers
from daemon.commands.card_claim import CardClaim, card_claim
from daemon.commands.output import answer, at_work
from daemon.commands.request import (
    allocation_of,
    allocation_spec,
    check_heads,
    measured_texts,
    pruning_request,
    refuse_given,
    request_of_search,
    self_if_none,
)
from daemon.monitor.remote import best_so_far
from daemon.settings.packages import need
from protocol.errors import SettingsError
from protocol.plans.allocation import Method
from protocol.plans.any_heads import Heads
from protocol.plans.spec import Dtype, Measure
from protocol.results.formats import FACTS, formats_of, gguf_type_of
from protocol.runtime.paths import expanded

log = structlog.get_logger()


@flags.grouped
def allocate(
    method: Annotated[Method, typer.Argument(help="An allocation without search.")],
    model: Annotated[str, typer.Option(help="A hub name, a folder, or `smollm2`.")],
    rate: Annotated[float, typer.Option(help="The pruning rate β.")],
    *,
    texts: flags.CalibrationFlags,
    how: flags.PruningFlags,
    options: flags.MethodFlags,
    dtype: flags.DtypeFlag = "bfloat16",
    seed: flags.Seed = 0,
    json_: flags.Json = False,
) -> None:
    """Say the pruning rates of an allocation; with --json a file that `evaluate` and `export` take as --rates."""
    spec, allocation = allocation_spec(model, rate, texts, how, dtype=dtype, seed=seed), allocation_of(method, options)
    with at_work(model) as progress:
        from gpu_worker.evaluation.one_shot import allocate_once

        result = allocate_once(spec, allocation, progress)
    answer(result.model_dump(mode="json"), json_, lambda: answers.allocation(result))


@flags.grouped
def evaluate(
    folder: Annotated[Path | None, typer.Argument(help="An exported model, measured as it is.")] = None,
    model: flags.Model = None,
    *,
    texts: flags.TextFlags,
    choice: flags.ChoiceFlags,
    how: flags.PruningFlags,
    options: flags.MethodFlags,
    heads: Annotated[
        Heads | None,
        typer.Option(help="`any`: any query heads may go. Masked, to compare with; never exported."),
    ] = None,
    fitness: Annotated[Measure, typer.Option(help="`kl`: measure the divergence from the dense model too.")] = (
        "perplexity"
    ),
    dtype: Annotated[
        Dtype | None, flags.chosen(Dtype, "Of weights and activations; as on a folder's card, else bfloat16")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, callback=flags.seed_of_torch, help="Chooses the windows; as on a folder's card, else 0."),
    ] = None,
    json_: flags.Json = False,
) -> None:
    """Measure a model's perplexity: as it is, or pruned by --allocate or --rates, without a search."""
    if (folder is None) == (model is None):
        raise SettingsError("name one model: a folder, or --model")
    if folder is not None:
        _check_holds_model(expanded(str(folder)))
    name = str(folder) if model is None else model
    if choice == flags.ChoiceFlags():
        refuse_given("the model is measured as it is", how, options)
        if heads is not None:
            raise SettingsError("--heads is not read here: the model is measured as it is")
        if fitness != "perplexity":
            raise SettingsError("--fitness kl compares with the dense model: give --allocate or --rates too")
        claim = card_claim(name, texts)
        if claim is None:
            claim = CardClaim(measured_texts(texts), seed or 0, dtype or "bfloat16")
        claim = claim.changed(dtype, seed)
        with at_work(name) as progress:
            from gpu_worker.evaluation.one_shot import evaluate_model

            result = evaluate_model(
                name,
                claim.texts,
                dtype=claim.dtype,
                seed=claim.seed,
                saved_text=claim.saved_text,
                progress=progress,
            )
        result = result.model_copy(update={"card_perplexity": claim.about(result.fitness_digest)})
    else:
        request = pruning_request(
            name, texts, choice, how, options, measure=fitness, dtype=dtype or "bfloat16", seed=seed or 0
        )
        check_heads(heads, request.spec)
        with at_work(name) as progress:
            from gpu_worker.evaluation.one_shot import evaluate_once

            result = evaluate_once(
                request.spec,
                request.choice,
                shape=request.shape,
                method=request.method,
                heads=heads or "rectangular",
                progress=progress,
            )
    answer(result.model_dump(mode="json"), json_, lambda: answers.evaluation(result))


def _check_holds_model(folder: Path) -> None:
    """Raise SettingsError for what `evaluate` cannot measure as it is, before it asks for a text."""
    if not folder.exists():
        raise SettingsError(f"there is no folder {str(folder)!r}; a model is named with --model, as is `smollm2`")
    if folder.is_dir() and not any((folder / name).exists() for name in (FACTS, "config.json")):
        raise SettingsError(f"the folder {str(folder)!r} holds no model: it has neither {FACTS} nor config.json")


@flags.grouped
def export(
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    format_: flags.FormatNames = None,
    gguf_type: flags.GgufTypeFlag = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
    search: Annotated[str | None, typer.Option("--search", help="Export the best of this search.")] = None,
    redis_url: flags.RedisUrl = None,
    folder: flags.Folder = Path("runs"),
    model: flags.Model = None,
    *,
    texts: flags.ExportTexts,
    choice: flags.ChoiceFlags,
    how: flags.PruningFlags,
    options: flags.MethodFlags,
    dtype: flags.DtypeFlag = "bfloat16",
    seed: flags.Seed = 0,
    json_: flags.Json = False,
) -> None:
    """Write a pruned model that loads elsewhere: the best of a search, or by --allocate or --rates.

    Without --data and --calibration-data the model is scored and measured on text that it writes itself.
    """
    formats = formats_of(format_ or ["hf"])
    stored = gguf_type_of(formats, gguf_type)
    if search is not None:
        if model is not None or choice != flags.ChoiceFlags():
            raise SettingsError("--search names the model and its rates: leave --model, --allocate and --rates out")
        refuse_given("--search prunes as the search did", texts, how, options)
        best = asyncio.run(best_so_far(search, redis_url, folder))
        request = request_of_search(best.record, best.origin)
    elif model is not None:
        request = pruning_request(model, self_if_none(texts), choice, how, options, dtype=dtype, seed=seed)
    else:
        raise SettingsError("give --search, or --model with --allocate or --rates")
    need("torch", "worker")
    from gpu_worker.export.folder import check_target

    check_target(expanded(out), force=force)
    with at_work(request.spec.model) as progress:
        from gpu_worker.export.export import Destination, export_once

        result = export_once(
            request.spec,
            request.choice,
            Destination(expanded(out), formats, stored, force),
            shape=request.shape,
            method=request.method,
            progress=progress,
        )
    answer(result.model_dump(mode="json"), json_, lambda: answers.exported(result, request.spec.fitness))
