"""`selfpruner prune`: from model to smaller model in one command: search, export, fine-tune, load again and check."""

import json
import math
import re
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.commands import flags, prune_steps
from daemon.commands import tables as answers
from daemon.commands.finetune import GOES_ON, check_apart, check_minutes, found_data
from daemon.commands.output import answer
from daemon.commands.prune_steps import Goal
from daemon.commands.request import PruningRequest, request_of_search
from daemon.launch.run_here import run_here
from daemon.monitor.summary import Summary
from daemon.settings.packages import need
from daemon.settings.search import SearchSettings
from daemon.settings.settings import Settings
from daemon.settings.sources import load
from protocol.errors import SelfPrunerError, SettingsError
from protocol.results.commands import PruneResult, Searched
from protocol.results.finetuning import ALPACA_GPT4, form_of
from protocol.results.formats import formats_of, gguf_type_of
from protocol.runtime.paths import expanded
from protocol.runtime.signals import Interrupted

LONGEST_NAME = 48
"""Letters of the folder's name in the search's."""


def prune(
    model: Annotated[str, typer.Argument(help="A hub name, a folder, or `smollm2`.")],
    rate: Annotated[float, typer.Option(help="The pruning rate β: the share of decoder parameters to remove.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    budget: Annotated[
        int | None, typer.Option(help="Evaluations, no fewer than the first population; left out: the config's.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The text to score and to search on: `wikitext2`, `c4`, `self`, or a text file.")
    ] = None,
    report_data: Annotated[str | None, typer.Option(help="The text to report on; --data if left out.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings; best.yaml if left out.")] = None,
    set_: flags.Set = None,
    format_: flags.FormatNames = None,
    gguf_type: flags.GgufTypeFlag = None,
    finetune: Annotated[bool, typer.Option("--finetune", help="Recover by LoRA before the end.")] = False,
    finetune_data: Annotated[
        str | None, typer.Option(help=f"As `finetune --data`; `{ALPACA_GPT4}` if left out.")
    ] = None,
    finetune_minutes: Annotated[float | None, typer.Option(help="Of training, at most.")] = None,
    finetune_micro_batch: Annotated[
        int | None, typer.Option(help="As `finetune --micro-batch`; less takes less memory.")
    ] = None,
    finetune_batch: Annotated[int | None, typer.Option(help="As `finetune --batch`.")] = None,
    finetune_learning_rate: Annotated[
        float | None, typer.Option(help="As `finetune --learning-rate`; small models take a higher one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
    json_: flags.Json = False,
) -> None:
    """Make a model smaller: search for the best pruning rates, prune by them, write the model and check it.

    Killed or interrupted, the same command goes on where it was.
    """
    tuning: dict[str, Any] = {
        "minutes": finetune_minutes,
        "micro_batch": finetune_micro_batch,
        "batch": finetune_batch,
        "learning_rate": finetune_learning_rate,
    }
    given = [name for name, value in ({"data": finetune_data} | tuning).items() if value is not None]
    if given and not finetune:
        raise SettingsError(f"--finetune-{given[0].replace('_', '-')} is of --finetune, which is missing")
    tuned_on = (finetune_data or ALPACA_GPT4) if finetune else None
    formats = formats_of(format_ or ["hf"])
    stored = gguf_type_of(formats, gguf_type)
    goal = Goal(expanded(out), formats, stored, force, tuned_on, **tuning)
    settings = prune_settings(model, rate, goal.out, budget, data, report_data, config, set_ or [])
    if finetune:
        prune_steps.recipe(goal, settings)
    if prune_steps.was_written_unrecorded(goal, settings):
        goal = replace(goal, force=True)
    before = _checked(goal, settings)
    try:
        request, summary = _searched(settings)
        if before is not None and not prune_steps.holds(goal.out, request):
            # The search was longer this time and found better rates: what this same command wrote is replaced.
            before, goal = None, replace(goal, force=True)
        searched = Searched(
            evaluations=sum(summary.candidates["by_outcome"].values()),
            seconds=summary.seconds,
            uniform_perplexity=summary.uniform.perplexity,
            uniform_report_perplexity=summary.uniform.report_perplexity,
        )
        written = before or prune_steps.write(request, goal, settings, searched)
        reloaded, runs_in_llama_cpp = prune_steps.check_written(written, goal, request, settings)
        result = PruneResult(
            search=settings.search.name,
            evaluations=searched.evaluations,
            proposed_by_llm=summary.candidates["by_source"]["llm"],
            search_seconds=searched.seconds,
            uniform_perplexity=searched.uniform_perplexity,
            uniform_report_perplexity=searched.uniform_report_perplexity,
            uniform_kl=summary.uniform.kl,
            uniform_parameters=summary.uniform.parameters,
            reconstruction=request.spec.reconstruction,
            dense_report_perplexity=summary.dense.report_perplexity,
            exported=written.exported,
            finetuned=written.finetuned,
            reloaded=reloaded,
            runs_in_llama_cpp=runs_in_llama_cpp,
        )
        prune_steps.report(result, goal)
    except Interrupted as end:
        end.left = GOES_ON
        raise
    answer(result.model_dump(mode="json"), json_, lambda: answers.pruned(result, request.spec.fitness))


def prune_settings(
    model: str,
    rate: float,
    out: Path,
    budget: int | None,
    data: str | None,
    report_data: str | None,
    config: Path | None,
    overrides: list[str],
) -> Settings:
    """The settings of the search, whose name, where none is given, follows from folder and spec."""
    chosen: dict[str, Any] = {"target.model": model, "target.rate": rate}
    if data is not None:
        chosen |= {"data.calibration": data, "data.fitness": data, "data.report": report_data or data}
    elif report_data is not None:
        chosen["data.report"] = report_data
    with as_file(files("configs") / "best.yaml") as best:
        usual = load(best, [f"target.model={json.dumps(model)}", f"target.rate={rate}"]).search.name
        if budget is not None:
            without = _given(chosen | {"search.max_evaluations": None})
            search = load(config or best, without + overrides).search
            if budget < search.population:
                raise SettingsError(
                    f"--budget ({budget}) is smaller than the first population ({search.population}): give more, or a "
                    "smaller --set search.population"
                )
            chosen |= {"search.max_evaluations": budget, "search.rounds": _rounds_for(budget, search)}
        given = _given(chosen) + overrides
        settings = load(config or best, given)
        is_named = "name" in settings.search.model_fields_set and (config is not None or settings.search.name != usual)
        if not is_named:
            words = re.sub(r"[^A-Za-z0-9._-]+", "-", out.name).strip("-")[:LONGEST_NAME]
            name = f"prune-{words}-{settings.spec().fingerprint[:6]}"
            settings = load(config or best, [*given, f"search.name={json.dumps(name)}"])
    return settings


def _given(chosen: dict[str, Any]) -> list[str]:
    """Settings as --set takes them."""
    return [f"{name}={json.dumps(value)}" for name, value in chosen.items()]


def _rounds_for(budget: int, search: SearchSettings) -> int:
    """As many rounds as `budget` evaluations need, and no fewer than there are."""
    offspring = search.mutations + search.crossovers
    return max(search.rounds, math.ceil((budget - search.population) / offspring)) if offspring else search.rounds


def _checked(goal: Goal, settings: Settings) -> prune_steps.Written | None:
    """What an earlier call has written already. Raises UsageError for what cannot be, before a search of hours."""
    if goal.data is not None:
        if goal.formats == ("gguf",):
            raise SettingsError("--finetune needs a format that can be trained: give --format hf beside gguf")
        if settings.target.dtype == "float16":
            raise SettingsError("--finetune needs target.dtype bfloat16 or float32: gradients overflow in float16")
        check_minutes("--finetune-minutes", goal.minutes)
        learned = found_data(goal.data)
        check_apart("--finetune-data", learned, "data.fitness (--data)", settings.data.fitness)
        check_apart("--finetune-data", learned, "data.report (--report-data)", settings.data.report)
    need("torch", "worker")
    if goal.data is not None:
        need("peft", "finetune")
    from gpu_worker.export.folder import check_target
    from gpu_worker.export.writer import check_formats
    from gpu_worker.models.loading import load_without_weights

    before = prune_steps.written_before(goal, settings)
    if before is None:
        check_target(goal.out, force=goal.force)
    model = load_without_weights(settings.target.model, settings.target.dtype)
    check_formats(model, goal.formats, goal.gguf_type)
    if before is None:
        prune_steps.check_disk(goal, settings, model.decoder.shape)
        if goal.data is not None:
            prune_steps.check_memory(goal, settings, model)
    if goal.data is not None:
        from gpu_worker.evaluation.target import check_length
        from gpu_worker.finetune.data import prepare_data, read_instructions

        recipe = prune_steps.recipe(goal, settings)
        check_length(model, recipe.seqlen)
        instructions = read_instructions(goal.data, recipe) if form_of(goal.data) == "alpaca" else None
        prepare_data(goal.data, instructions, model, recipe)
    return before


def _searched(settings: Settings) -> tuple[PruningRequest, Summary]:
    """The best of the search, which goes on from what is there of it."""
    summary, interrupted = run_here(settings)
    if interrupted is not None:
        raise Interrupted(interrupted)
    if summary is None or not summary.finished:
        raise SelfPrunerError(f"the search was stopped before its end; {GOES_ON}")
    if summary.best is None:
        raise SelfPrunerError(f"no candidate could be measured; {settings.folder}/evaluations.jsonl says why")
    return request_of_search(_best(settings, summary.rates), f"search {settings.search.name}"), summary


def _best(settings: Settings, rates: tuple[float, ...]) -> dict[str, Any]:
    """What best.json holds. Raises SelfPrunerError where it is not of the best `rates`, as on a full disk."""
    file = settings.folder / "best.json"
    try:
        record = json.loads(file.read_bytes())
        if record["rates"] == list(rates):
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SelfPrunerError(f"{file} cannot be read ({error}); the same command writes it anew") from error
    raise SelfPrunerError(
        f"{file} does not hold the search's best: it could not be written; make room on the disk, and the same command "
        "goes on"
    )
