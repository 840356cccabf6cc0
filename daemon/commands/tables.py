"""Results of commands as tables and lines for people."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import RenderableType
from rich.table import Table

from protocol.errors import DataError
from protocol.plans.allocation import uniform_label
from protocol.plans.candidate import Provenance
from protocol.plans.plan import LayerPlan, Parameters
from protocol.plans.shape import ModelShape
from protocol.plans.spec import NAMED_TEXTS, SearchSpec, TextSpec, is_examples
from protocol.results.commands import (
    AllocationResult,
    EvaluationResult,
    ExportResult,
    FinetuneResult,
    GgufPerplexity,
    PruneResult,
    ZeroShotResult,
)
from protocol.results.finetuning import Perplexities
from protocol.results.speeds import BatchSpeed, SpeedResult, Spread

KL_IN_WORDS = "kl is the divergence from the dense model, in nats per token"
MASKED = "query heads are masked, for comparison only: no export format supports such a model"


def evaluation(result: EvaluationResult) -> Iterator[RenderableType]:
    """Show the perplexity of the model, also that of the dense model if it was pruned, and the texts."""
    yield f"{result.model}, {_removed(result.rate, _with_heads(result))}"
    table = _figures(report=result.report_perplexity is not None, kl=result.kl is not None)
    of = result.parameters
    if result.rate is None:
        _add(table, "unchanged", result.perplexity, result.report_perplexity, None, of.total_after)
    else:
        _add(table, "dense", result.dense_perplexity, result.dense_report_perplexity, 0.0, of.total_before)
        _add(table, "pruned", result.perplexity, result.report_perplexity, result.kl, of.total_after)
    yield table
    yield _measured_on(result.data, result.tokens, result.seqlen)
    if result.calibration is not None:
        yield f"scored on {_text_name(result.calibration)}"
    if result.heads == "any":
        yield MASKED
    if result.kl is not None:
        yield KL_IN_WORDS
    if result.card_perplexity is not None:
        yield f"the model card states {result.card_perplexity:,.2f} on the same tokens"
    if result.card_report_perplexity is not None:
        yield f"the model card states {result.card_report_perplexity:,.2f} on the same tokens of the report text"
    if result.card_texts is not None:
        option = "--data" if result.card_perplexity is None else "--report-data"
        yield (
            f"the model card's perplexity is of other tokens than those of {option}: give the card's texts "
            f"({result.card_texts}), without sizes, to compare"
        )
    yield f"{'measuring' if result.rate is None else 'pruning and measuring'} took {result.seconds:,.1f} s"


def exported(result: ExportResult, text: TextSpec) -> Iterator[RenderableType]:
    """Show what was written and its perplexity on `text`."""
    yield f"{result.folder}: {result.model}, {_removed(result.rate, result.method)}, as {' and '.join(result.formats)}"
    table = _figures(report=False, kl=result.kl is not None)
    _add(table, "dense", result.dense_perplexity, None, 0.0, result.parameters.total_before)
    _add(table, "pruned", result.perplexity, None, result.kl, result.parameters.total_after)
    yield table
    yield _measured_on(text.source, result.tokens, result.seqlen)
    if result.report_perplexity is not None:
        yield f"pruned, on the report text: {result.report_perplexity:,.2f}; see README.md for the dense model's"
    files = _table("file", "MB")
    for name, size in result.files.items():
        files.add_row(name, f"{size / 1e6:,.2f}" if size >= 1e4 else "<0.01")
    yield files
    yield from _in_llama_cpp(result.gguf)
    yield f"writing took {result.seconds:,.1f} s"
    yield f"next: {_next_command(result, text)}"


def pruned(result: PruneResult, text: TextSpec) -> Iterator[RenderableType]:
    """Show the result of the search, what was written, and the check after reloading."""
    last = result.finetuned or result.exported
    yield f"{last.folder}: {result.exported.model}, {_removed(result.exported.rate, result.exported.method)}"
    best, of = result.exported, result.exported.parameters
    table = _figures(report=best.report_perplexity is not None, kl=best.kl is not None)
    _add(table, "dense", best.dense_perplexity, result.dense_report_perplexity, 0.0, of.total_before)
    label = uniform_label(result.reconstruction)
    if result.uniform_perplexity is not None:
        uniform = (result.uniform_perplexity, result.uniform_report_perplexity, result.uniform_kl)
        _add(table, label, *uniform, result.uniform_parameters.total_after)
    _add(table, "pruned", best.perplexity, best.report_perplexity, best.kl, of.total_after)
    if result.finetuned:
        tuned = result.finetuned.finetuning
        _add(table, "fine-tuned", _after(tuned.perplexity), _after(tuned.report_perplexity), None, of.total_after)
    yield table
    if result.uniform_perplexity is not None:
        reported = best.report_perplexity, result.uniform_report_perplexity
        on_report = f" ({reported[0] / reported[1]:.3f} on the report text)" if reported[0] and reported[1] else ""
        ratio = f"{best.perplexity / result.uniform_perplexity:.3f}{on_report}"
        yield f"perplexity is {ratio} times that of {label} (one search, one seed)"
        if result.improved is False:
            yield (
                f"the search has gained nothing over {label}: give it more evaluations (--budget) and more text "
                "(--data, --set data.fitness_windows=N)"
            )
    yield _measured_on(text.source, best.tokens, best.seqlen)
    if best.kl is not None:
        yield KL_IN_WORDS
    took = f"in {result.search_seconds:,.0f} s (search {result.search})"
    by_llm = f"{result.proposed_by_llm:,}" if result.proposed_by_llm else "none"
    yield f"searched with {result.evaluations:,} evaluations {took}, {by_llm} of them proposed by the LLM"
    if result.reloaded is not None:
        yield f"perplexity after reloading: {result.reloaded:,.2f}"
    yield from _in_llama_cpp(last.gguf)
    if result.runs_in_llama_cpp:
        yield "the GGUF file runs in llama.cpp"
    yield f"written as {' and '.join(last.formats)}: {', '.join(last.files)}"
    yield f"next: selfpruner speed {shlex.quote(str(last.folder))} --baseline {shlex.quote(result.exported.model)}"


def _in_llama_cpp(gguf: GgufPerplexity | None) -> Iterator[RenderableType]:
    if gguf is not None:
        yield (
            f"in llama.cpp the GGUF file ({gguf.file_type}) measures {gguf.perplexity:,.2f} on {gguf.tokens:,} tokens, "
            f"where the model in memory has {gguf.in_memory:,.2f}"
        )


def _after(measured: Perplexities | None) -> float | None:
    return None if measured is None else measured.after


def finetuned(result: FinetuneResult) -> Iterator[RenderableType]:
    """Show the training data, the figures before and after, and where the model is."""
    tuned = result.finetuning
    how = "all weights of the projections" if tuned.recipe.method == "full" else f"LoRA, r {tuned.recipe.rank}"
    how += f", partly from the predictions of {tuned.teacher}" if tuned.teacher else ""
    yield f"{result.folder}: {result.model}, pruned, fine-tuned on {tuned.data} ({how}), as {', '.join(result.formats)}"
    table = _table("", "before", "after")
    table.add_row("mean loss, first 10 % and last 10 % of steps", f"{tuned.first_loss:.3f}", f"{tuned.last_loss:.3f}")
    if tuned.perplexity is not None:
        table.add_row("perplexity", _number(tuned.perplexity.before, 2), _number(tuned.perplexity.after, 2))
    if tuned.report_perplexity is not None:
        figures = (tuned.report_perplexity.before, tuned.report_perplexity.after)
        table.add_row("on the report text", *(_number(each, 2) for each in figures))
    yield table
    yield from _in_llama_cpp(result.gguf)
    if tuned.perplexity is not None:
        yield _measured_on(tuned.perplexity.text.source, tuned.perplexity.tokens, tuned.perplexity.text.seqlen)
    resumed = f", resumed after {result.resumed_from:,}" if result.resumed_from else ""
    yield (
        f"{tuned.steps:,} steps{resumed}, {tuned.tokens:,} tokens predicted in {result.seconds:,.1f} s; "
        f"{_millions(tuned.trained_parameters)} of {_millions(result.parameters.total_after)} parameters were trained"
    )
    if result.ended_by == "time":
        yield "training ended at the time limit, before its last step"
    yield "finetune.json lists the loss of every step"


def allocation(result: AllocationResult) -> Iterator[RenderableType]:
    """Show the rates, and what each layer keeps."""
    yield f"{result.model}, {result.spec.rate:.1%} of the decoder's parameters to be removed by {result.method}"
    yield _layers(result.rates, result.plan, result.shape)
    yield _parameters(result.parameters)
    yield "--json prints a file for --rates of evaluate and export"


def zero_shot(result: ZeroShotResult) -> Iterator[RenderableType]:
    """Show both accuracies of every task, the one that counts, and the mean."""
    yield f"{result.model}, {_removed(result.rate, result.method)}"
    table = _table("task", "items", "acc", "acc_norm", "counts", "±")
    for task in result.tasks:
        figures = (_percent(task.acc), _percent(task.acc_norm), task.metric, _percent(task.standard_error))
        table.add_row(task.title, f"{task.items:,}", *figures)
    yield table
    yield f"mean accuracy: {result.mean:.2%} over {len(result.tasks)} task{'s' * (len(result.tasks) != 1)}"
    yield _parameters(result.parameters)
    if result.calibration is not None:
        yield f"scored on {_text_name(result.calibration)}"
    if result.limit is not None:
        yield f"the first {result.limit:,} items of each task"
    yield f"evaluation took {result.seconds:,.1f} s"


def speed(result: SpeedResult) -> Iterator[RenderableType]:
    """Show the sizes, and the tokens per second, of both models in each engine."""
    yield f"{result.folder} and {result.baseline}: prompts of {result.prompt} tokens, {result.generate} generated"
    for found in result.engines:
        threads = f", {found.threads} thread{'s' * (found.threads != 1)}" if found.threads else ""
        yield f"\n{found.engine} on {found.device}{threads}, {found.pruned.weight_type}"
        sizes = _table("", "decoder parameters", "parameters", "weights MB", "KV cache MB", "KV bytes/token", "disk MB")
        for name, size in (("dense", found.dense), ("pruned", found.pruned)):
            sizes.add_row(
                name,
                _millions(size.decoder_parameters),
                _millions(size.total_parameters),
                _number(size.weight_bytes / 1e6, 1),
                _number(size.kv_cache_bytes / 1e6, 1),
                f"{size.kv_cache_bytes_per_token:,}",
                _number(size.disk_bytes and size.disk_bytes / 1e6, 1),
            )
        yield sizes
        yield _rates(found.batches, result.repeats if result.interrupted else None)
    if result.interrupted:
        yield "partial, because the measurement was interrupted: figures are of the whole repeats until then"
    repeats = "the" if result.interrupted else result.repeats
    yield f"medians and ranges of {repeats} repeats after {result.warm_up} for warm-up, dense and pruned in turn"
    for reason in result.skipped.values():
        yield f"skipped: {reason}"


def _rates(batches: Sequence[BatchSpeed], wanted: int | None) -> Table:
    """Return a table with two rows per batch size: tokens per second of prefill and decode.

    `wanted` is the number of repeats if some of them are missing.
    """
    table = _table("batch", "", "dense tokens/s", "pruned tokens/s", "speed-up", *["repeats"] * bool(wanted))
    for batch in batches:
        for phase, found in (("prefill", batch.prefill), ("decode", batch.decode)):
            cells = [_spread(found.dense, 1), _spread(found.pruned, 1), _spread(found.speed_up, 2)]
            cells += [f"{batch.repeats} of {wanted}"] * bool(wanted)
            table.add_row(str(batch.batch_size), phase, *cells)
    return table


def _spread(found: Spread, digits: int) -> str:
    return f"{found.median:,.{digits}f} ({found.lowest:,.{digits}f}–{found.highest:,.{digits}f})"


class _Best(BaseModel):
    """The contents of best.json."""

    model_config = ConfigDict(extra="ignore")

    search: str
    perplexity: float
    kl: float | None = None
    parameters: Parameters
    tokens: int
    seqlen: int
    id: str
    provenance: Provenance
    rates: tuple[float, ...]
    plan: tuple[LayerPlan, ...]
    shape: ModelShape
    spec: SearchSpec


def best(record: dict[str, Any]) -> Iterator[RenderableType]:
    """Show the best candidate of a search. Raises DataError for a record of another version."""
    try:
        found = _Best.model_validate(record)
    except ValidationError as error:
        raise DataError("the best rates were saved by another version of Self-Pruner; --json shows them") from error
    spec = found.spec
    yield f"{found.search}: the best of {spec.model} with {spec.rate:.1%} of the decoder's parameters removed"
    kl = "" if found.kl is None else f", kl {found.kl:.4f}"
    yield f"perplexity {found.perplexity:,.2f}{kl}; {_measured_on(spec.fitness.source, found.tokens, found.seqlen)}"
    who = found.provenance
    yield f"candidate {found.id}, made by the {who.agent} ({who.source}) in round {who.round}"
    if who.rule:
        yield f"rule: {who.rule}"
    yield _layers(found.rates, found.plan, found.shape)
    yield _parameters(found.parameters)
    yield f"next: selfpruner export --search {found.search} --out DIR"


def _with_heads(result: EvaluationResult) -> str | None:
    """Return the method, with the kind of uniform baseline if there are several."""
    if result.method == "uniform" and result.reconstruction is not None and result.heads is not None:
        return uniform_label(result.reconstruction, result.heads)
    return f"{result.method}, any heads" if result.heads == "any" else result.method


def _removed(rate: float | None, method: str | None) -> str:
    return "unchanged" if rate is None else f"{rate:.1%} of the decoder's parameters removed by {method}"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _figures(*, report: bool, kl: bool) -> Table:
    return _table("", "perplexity", *["on the report text"] * report, *["kl"] * kl, "parameters")


def _add(
    table: Table, name: str, perplexity: float | None, report: float | None, kl: float | None, parameters: int
) -> None:
    """Add a row with a figure for each column of the table."""
    cells = {
        "perplexity": _number(perplexity, 2),
        "on the report text": _number(report, 2),
        "kl": _number(kl, 4),
        "parameters": _millions(parameters),
    }
    table.add_row(name, *(cells[str(column.header)] for column in table.columns[1:]))


def _layers(rates: Sequence[float], plan: Sequence[LayerPlan], shape: ModelShape) -> Table:
    """Return a table with a row per layer: its rate or rates, and the heads and MLP channels that it keeps."""
    each = len(rates) // len(plan)
    titles = ["rate"] if each == 1 else ["attention rate", "MLP rate"]
    table = _table("layer", *titles, "query heads", "KV heads", "MLP width")
    for i, (kept, whole) in enumerate(zip(plan, shape.layers, strict=True)):
        table.add_row(
            str(i),
            *(f"{rate:.3f}" for rate in rates[i * each : (i + 1) * each]),
            f"{kept.query_heads} of {whole.query_heads}",
            f"{kept.kv_heads} of {whole.kv_heads}",
            f"{kept.mlp_channels:,} of {whole.mlp_channels:,}",
        )
    return table


def _parameters(parameters: Parameters) -> str:
    decoder = _millions(parameters.decoder_after)
    if parameters.decoder_after != parameters.decoder_before:
        decoder += f" of {_millions(parameters.decoder_before)}"
    return f"parameters: {decoder} in the decoder, {_millions(parameters.total_after)} in all"


def _measured_on(source: str, tokens: int, seqlen: int) -> str:
    if is_examples(source):
        return f"measured on the answers of {_text_name(source)}: {tokens:,} tokens predicted"
    windows = tokens // (seqlen - 1)  # a window's first token is never predicted
    return (
        f"measured on {_text_name(source)}: {windows} window{'s' * (windows != 1)} of {seqlen} tokens, "
        f"{tokens:,} of them predicted"
    )


def _text_name(source: str) -> str:
    return "text that the dense model generated" if source == "self" else Path(source).name


def _next_command(result: ExportResult, text: TextSpec) -> str:
    if result.formats == ("gguf",):
        file = next(name for name in result.files if name.endswith(".gguf"))
        return f"llama-cli -m {shlex.quote(str(result.folder / file))} -p 'Once upon a time'"
    command = f"selfpruner evaluate {shlex.quote(str(result.folder))}"
    return command if text.source in NAMED_TEXTS else f"{command} --data {shlex.quote(text.source)}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"
