"""`selfpruner allocate | evaluate | export`: pruning without a search, or after one."""

import asyncio
from pathlib import Path
from typing import Annotated, get_args

import structlog
import typer

from daemon.commands import flags, tables
from daemon.commands.output import print_result, show_progress
from daemon.commands.request import (
    allocation_of,
    allocation_spec,
    check_heads,
    measured_texts,
    pruning_request,
    refuse_given,
    refuse_unread,
    request_of_search,
    self_if_none,
    text_of,
)
from daemon.monitor.front import FRONT
from daemon.monitor.remote import best_so_far
from daemon.monitor.searched import record_of_best, search_summary
from daemon.settings.packages import need
from protocol.errors import SettingsError
from protocol.plans.allocation import Method, PruningRequest
from protocol.plans.any_heads import Heads
from protocol.plans.spec import Dtype, Measure
from protocol.results.commands import SearchSummary
from protocol.results.formats import FACTS, Destination, formats_of, gguf_type_of
from protocol.runtime.paths import expanded

log = structlog.get_logger()


@flags.grouped
def allocate(
    method: Annotated[Method | None, typer.Argument(help="Allocation method; `rule` with --rule.")] = None,
    *,
    model: Annotated[str, typer.Option(help="A Hugging Face name, a folder, a GGUF file, or `smollm2`.")],
    rate: Annotated[float, typer.Option(help="Pruning rate β: the share of decoder parameters to remove.")],
    texts: flags.CalibrationFlags,
    how: flags.PruningFlags,
    options: flags.MethodFlags,
    dtype: flags.DtypeFlag = "bfloat16",
    seed: flags.Seed = 0,
    json_: flags.Json = False,
) -> None:
    """Compute pruning rates without a search; with --json, a file for `--rates` of other commands."""
    if method is None and options.rule is None:
        raise SettingsError(f"give an allocation method: {', '.join(get_args(Method))}")
    method = method or "rule"
    refuse_unread(method, options)
    spec, allocation = allocation_spec(model, rate, texts, how, dtype=dtype, seed=seed), allocation_of(method, options)
    with show_progress(model) as progress:
        from gpu_worker.evaluation.one_shot import allocate_once

        result = allocate_once(spec, allocation, progress)
    print_result(result.model_dump(mode="json"), json_, lambda: tables.allocation(result))


@flags.grouped
def evaluate(
    folder: Annotated[Path | None, typer.Argument(help="An exported model, measured unchanged.")] = None,
    model: flags.Model = None,
    *,
    texts: flags.TextFlags,
    choice: flags.ChoiceFlags,
    how: flags.PruningFlags,
    options: flags.MethodFlags,
    heads: Annotated[
        Heads | None,
        typer.Option(
            help="`any`: remove any query heads. They are masked, for comparison only, and cannot be exported."
        ),
    ] = None,
    fitness: Annotated[Measure, typer.Option(help="`kl`: also measure the divergence from the dense model.")] = (
        "perplexity"
    ),
    dtype: Annotated[
        Dtype | None, flags.chosen(Dtype, "Data type (by default as on the model card, else bfloat16)")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            callback=flags.seed_of_torch,
            help="Seed of the text windows; by default as on the model card, else 0.",
        ),
    ] = None,
    json_: flags.Json = False,
) -> None:
    """Measure a model's perplexity, unchanged or pruned with --allocate or --rates."""
    if (folder is None) == (model is None):
        raise SettingsError("give one model: a folder, or --model")
    if folder is not None:
        _check_holds_model(expanded(str(folder)))
    name = str(folder) if model is None else model
    if choice == flags.ChoiceFlags():
        refuse_given("the model is measured unchanged", how, options)
        if heads is not None:
            raise SettingsError("--heads has no effect here: the model is measured unchanged")
        if fitness != "perplexity":
            raise SettingsError("--fitness kl compares with the dense model: give --allocate or --rates as well")
        from gpu_worker.export.card_measurement import CardMeasurement, card_measurement

        data, report = (text and text_of(text, None, texts.seqlen).source for text in (texts.data, texts.report_data))
        measurement = card_measurement(name, data, report)
        if measurement is None:
            measurement = CardMeasurement(measured_texts(texts), 0, "bfloat16")
        elif texts != flags.TextFlags(data=texts.data, report_data=texts.report_data):
            measurement = measurement.on(measured_texts(texts))
        measurement = measurement.changed(dtype, seed)
        with show_progress(name) as progress:
            result = measurement.run(name, progress)
    else:
        request = pruning_request(
            name, texts, choice, how, options, measure=fitness, dtype=dtype or "bfloat16", seed=seed or 0
        )
        check_heads(heads, request.spec)
        with show_progress(name) as progress:
            from gpu_worker.evaluation.one_shot import evaluate_once

            result = evaluate_once(request, heads or "rectangular", progress)
    print_result(result.model_dump(mode="json"), json_, lambda: tables.evaluation(result))


def _searched(
    search: str, rate: float | None, redis_url: str | None, folder: Path
) -> tuple[PruningRequest, SearchSummary | None]:
    """Return the request for a search's best, or for a rate of a front, and what its export says of the search."""
    if rate is not None:
        from daemon.launch.front import read_front, request_at

        front = read_front(folder / search)
        search = next((point.search for point in front.points if point.rate == rate), "")
        if not search:
            return request_at(folder / front.name, front, rate), None
    elif (folder / search / FRONT).is_file():
        raise SettingsError(f"{search} has several rates: give --rate, or --search with the name of one, as in `list`")
    best = asyncio.run(best_so_far(search, redis_url, folder))
    record = record_of_best(folder / search, str(best.record.get("id")))
    searched = None if record is None else search_summary(record.summary, record)
    return request_of_search(best.record, best.origin), searched


def _check_holds_model(folder: Path) -> None:
    """Raise SettingsError for a folder without a model. This error comes before those about missing texts."""
    if not folder.exists():
        raise SettingsError(f"there is no folder {str(folder)!r}; name a model with --model, such as `smollm2`")
    if folder.is_dir() and not any((folder / name).exists() for name in (FACTS, "config.json")):
        raise SettingsError(f"the folder {str(folder)!r} holds no model: it has neither {FACTS} nor config.json")


@flags.grouped
def export(
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    format_: flags.FormatNames = None,
    gguf_type: flags.GgufTypeFlag = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    search: Annotated[str | None, typer.Option("--search", help="Export the best candidate of this search.")] = None,
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
    """Export a pruned model: the best of a search, or one pruned with --allocate or --rates.

    After a search at several rates (target.rates), --rate takes any rate from the lowest to the highest of them.
    Without --data and --calibration-data, the model is scored and measured on text that it generates.
    """
    formats = formats_of(format_ or ["hf"])
    destination = Destination(expanded(out), formats, gguf_type_of(formats, gguf_type), force)
    searched = None
    if search is not None:
        if model is not None or choice != flags.ChoiceFlags(rate=choice.rate):
            raise SettingsError(
                "--search determines the model and its rates: leave out --model, --allocate and --rates"
            )
        refuse_given("--search prunes with the search's settings", texts, how, options)
        request, searched = _searched(search, choice.rate, redis_url, expanded(str(folder)))
    elif model is not None:
        request = pruning_request(model, self_if_none(texts), choice, how, options, dtype=dtype, seed=seed)
    else:
        raise SettingsError("give --search, or --model with --allocate or --rates")
    need("torch", "worker")
    from gpu_worker.export.folder import check_target

    check_target(destination.folder, force=force)
    with show_progress(request.spec.model) as progress:
        from gpu_worker.export.export import export_once

        result = export_once(request, destination, progress, searched)
    print_result(result.model_dump(mode="json"), json_, lambda: tables.exported(result, request.spec.fitness))
