"""`selfpruner allocate | evaluate | export`: pruning without a search, or after one."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from daemon import flags
from daemon.card_claim import CardClaim, card_claim
from daemon.pruning_request import (
    allocation_of,
    allocation_spec,
    measured_texts,
    pruning_request,
    refuse_given,
    request_of_search,
    self_if_none,
)
from daemon.remote import RemoteSearch, ask
from daemon.terminal import answer, need
from protocol import logs
from protocol.allocation import Method
from protocol.errors import SettingsError
from protocol.formats import Format, GgufType
from protocol.paths import expanded
from protocol.spec import Measure


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
    need("torch", "worker")
    from gpu_worker.evaluate import allocate_once

    spec = allocation_spec(model, rate, texts, how, dtype=dtype, seed=seed)
    with _progress(model) as progress:
        result = allocate_once(spec, allocation_of(method, options), progress)
    answer(result.model_dump(mode="json"), json_)


@flags.grouped
def evaluate(
    folder: Annotated[Path | None, typer.Argument(help="An exported model, measured as it is.")] = None,
    model: flags.Model = None,
    *,
    texts: flags.TextFlags,
    choice: flags.ChoiceFlags,
    how: flags.PruningFlags,
    options: flags.MethodFlags,
    fitness: Annotated[Measure, typer.Option(help="`kl`: measure the divergence from the dense model too.")] = (
        "perplexity"
    ),
    dtype: flags.DtypeFlag = "bfloat16",
    seed: flags.Seed = 0,
    json_: flags.Json = False,
) -> None:
    """Measure a model's perplexity: as it is, or pruned by --allocate or --rates, without a search."""
    need("torch", "worker")
    from gpu_worker.evaluate import evaluate_as_it_is, evaluate_once

    if (folder is None) == (model is None):
        raise SettingsError("name one model: a folder, or --model")
    name = str(folder) if model is None else model
    if choice == flags.ChoiceFlags():
        refuse_given("the model is measured as it is", how, options)
        if fitness != "perplexity":
            raise SettingsError("--fitness kl compares with the dense model: give --allocate or --rates too")
        claim = card_claim(name, texts) or CardClaim(measured_texts(texts), seed, dtype)
        with _progress(name) as progress:
            result = evaluate_as_it_is(name, claim.texts, dtype=claim.dtype, seed=claim.seed, progress=progress)
        result = result.model_copy(update={"card_perplexity": claim.about(result.fitness_digest)})
    else:
        request = pruning_request(name, texts, choice, how, options, measure=fitness, dtype=dtype, seed=seed)
        with _progress(name) as progress:
            result = evaluate_once(
                request.spec, request.choice, shape=request.shape, method=request.method, progress=progress
            )
    answer(result.model_dump(mode="json"), json_)


@flags.grouped
def export(
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    format_: Annotated[Format, typer.Option("--format", help="What will load it; see docs/usage.md.")] = "hf",
    gguf_type: Annotated[GgufType, typer.Option(help="gguf: how weights are stored.")] = "f16",
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
    need("torch", "worker")
    from gpu_worker.exporter import Destination, export_once

    if search is not None:
        if model is not None or choice != flags.ChoiceFlags():
            raise SettingsError("--search names the model and its rates: leave --model, --allocate and --rates out")
        refuse_given("--search prunes as the search did", texts, how, options)
        record = asyncio.run(ask(search, redis_url, folder, RemoteSearch.best, otherwise="best.json"))
        request = request_of_search(record)
    elif model is not None:
        request = pruning_request(model, self_if_none(texts), choice, how, options, dtype=dtype, seed=seed)
    else:
        raise SettingsError("give --search, or --model with --allocate or --rates")
    with _progress(request.spec.model) as progress:
        result = export_once(
            request.spec,
            request.choice,
            Destination(expanded(out), format_, gguf_type, force),
            shape=request.shape,
            method=request.method,
            progress=progress,
        )
    answer(result.model_dump(mode="json"), json_)


@contextmanager
def _progress(model: str) -> Iterator[Callable[[str, int, int], None]]:
    """One line on the terminal that says what is under way; above it, before `model` is loaded, what that needs."""
    from gpu_worker.answering import preparing

    logs.configure()
    with preparing(model), Console(stderr=True).status("") as line:
        yield lambda stage, done, total: line.update(f"{stage} {done}/{total}")
