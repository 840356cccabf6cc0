"""`selfpruner prune`: search, export, fine-tune, reload and check in one command."""

import json
import math
import re
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.commands import flags, prune_steps, tables
from daemon.commands.finetune import RESUME_HINT, check_apart, check_minutes, found_data
from daemon.commands.output import print_result
from daemon.commands.prune_steps import Goal
from daemon.commands.request import PruningRequest, request_of_search
from daemon.launch.run import run_here
from daemon.monitor.summary import Summary
from daemon.settings.packages import need
from daemon.settings.search import SearchSettings
from daemon.settings.settings import Settings
from daemon.settings.sources import load
from protocol.errors import SelfPrunerError, SettingsError
from protocol.results.commands import PruneResult, SearchSummary
from protocol.results.finetuning import ALPACA_GPT4, form_of
from protocol.results.formats import formats_of, gguf_type_of
from protocol.runtime.paths import expanded
from protocol.runtime.signals import Interrupted

LONGEST_NAME = 48
"""Maximum number of letters taken from the folder's name for the search's name."""


def prune(
    model: Annotated[str, typer.Argument(help="A Hugging Face name, a folder, or `smollm2`.")],
    rate: Annotated[float, typer.Option(help="Pruning rate β: the share of decoder parameters to remove.")],
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    budget: Annotated[
        int | None, typer.Option(help="Number of evaluations, at least the first population; by default the config's.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to score and search on: `wikitext2`, `c4`, `self`, or a text file.")
    ] = None,
    report_data: Annotated[str | None, typer.Option(help="Text to report on; --data by default.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; best.yaml by default.")] = None,
    set_: flags.Set = None,
    format_: flags.FormatNames = None,
    gguf_type: flags.GgufTypeFlag = None,
    finetune: Annotated[bool, typer.Option("--finetune", help="Fine-tune with LoRA after pruning.")] = False,
    finetune_data: Annotated[
        str | None, typer.Option(help=f"As `finetune --data`; `{ALPACA_GPT4}` by default.")
    ] = None,
    finetune_minutes: Annotated[float | None, typer.Option(help="Maximum training time in minutes.")] = None,
    finetune_micro_batch: Annotated[
        int | None, typer.Option(help="As `finetune --micro-batch`; lower it to save memory.")
    ] = None,
    finetune_batch: Annotated[int | None, typer.Option(help="As `finetune --batch`.")] = None,
    finetune_learning_rate: Annotated[
        float | None, typer.Option(help="As `finetune --learning-rate`; small models need a higher one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    json_: flags.Json = False,
) -> None:
    """Make a model smaller: search for the best pruning rates, export the pruned model and check it.

    After an interruption, the same command resumes where it left off.
    """
    tuning: dict[str, Any] = {
        "minutes": finetune_minutes,
        "micro_batch": finetune_micro_batch,
        "batch": finetune_batch,
        "learning_rate": finetune_learning_rate,
    }
    given = [name for name, value in ({"data": finetune_data} | tuning).items() if value is not None]
    if given and not finetune:
        raise SettingsError(f"--finetune-{given[0].replace('_', '-')} needs --finetune")
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
            # The search ran longer this time and found better rates: replace what this same command wrote before.
            before, goal = None, replace(goal, force=True)
        searched = SearchSummary(
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
        end.left = RESUME_HINT
        raise
    print_result(result.model_dump(mode="json"), json_, lambda: tables.pruned(result, request.spec.fitness))


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
    """Return the settings of the search. Its default name is made from the folder and the spec."""
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
                    f"--budget ({budget}) is smaller than the first population ({search.population}): raise it, "
                    "or lower --set search.population"
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
    """Return settings in the form of --set."""
    return [f"{name}={json.dumps(value)}" for name, value in chosen.items()]


def _rounds_for(budget: int, search: SearchSettings) -> int:
    """Return the rounds that `budget` evaluations need, at least those in the settings."""
    offspring = search.mutations + search.crossovers
    return max(search.rounds, math.ceil((budget - search.population) / offspring)) if offspring else search.rounds


def _checked(goal: Goal, settings: Settings) -> prune_steps.Written | None:
    """Return what an earlier call has written. Raises UsageError for invalid input before a search of hours."""
    if goal.data is not None:
        if goal.formats == ("gguf",):
            raise SettingsError("--finetune needs a format that can be trained: add --format hf")
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
    """Run or resume the search; return its best candidate as a request, and its summary."""
    summary, interrupted = run_here(settings)
    if interrupted is not None:
        raise Interrupted(interrupted)
    if summary is None or not summary.finished:
        raise SelfPrunerError(f"the search was stopped before its end; {RESUME_HINT}")
    if summary.best is None:
        raise SelfPrunerError(f"no candidate could be measured; {settings.folder}/evaluations.jsonl says why")
    return request_of_search(_best(settings, summary.rates), f"search {settings.search.name}"), summary


def _best(settings: Settings, rates: tuple[float, ...]) -> dict[str, Any]:
    """Return best.json. Raises SelfPrunerError if it does not hold the best `rates`, as after a full disk."""
    file = settings.folder / "best.json"
    try:
        record = json.loads(file.read_bytes())
        if record["rates"] == list(rates):
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SelfPrunerError(f"{file} cannot be read ({error}); run the same command again to write it") from error
    raise SelfPrunerError(
        f"{file} does not hold the search's best, because it could not be written; make room on the disk, then "
        "run the same command again"
    )
