"""`selfpruner prune`: search, export, fine-tune, reload and check in one command."""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.commands import flags, tables
from daemon.commands.finetune import RESUME_HINT, RecipeFlags, check_apart, check_minutes, found_data, recipe_of
from daemon.commands.output import name_charts, print_result, show_progress
from daemon.commands.request import request_of_search
from daemon.monitor.searched import record_of_best, search_summary
from daemon.monitor.summary import Summary
from daemon.settings.packages import need
from daemon.settings.search import SearchSettings
from daemon.settings.settings import Settings
from daemon.settings.sources import load
from protocol.errors import SelfPrunerError, SettingsError
from protocol.plans.allocation import PruningRequest
from protocol.results.commands import PruneResult, SearchSummary
from protocol.results.finetuning import ALPACA_GPT4, Recipe
from protocol.results.formats import Destination, formats_of, gguf_type_of
from protocol.runtime.paths import check_model, expanded
from protocol.runtime.signals import Interrupted

if TYPE_CHECKING:
    from daemon.launch.front import RunSearch
    from gpu_worker.finetune.prune import Finished
    from gpu_worker.finetune.prune_records import Tuning

LONGEST_NAME = 48
"""Maximum number of letters taken from the folder's name for the search's name."""


@dataclass(frozen=True)
class SearchFlags:
    """The search for the rates."""

    budget: Annotated[
        int | None, typer.Option(help="Number of evaluations, at least the first population; by default the config's.")
    ] = None
    data: Annotated[
        str | None, typer.Option(help="Text to score and search on: `wikitext2`, `c4`, `self`, or a text file.")
    ] = None
    report_data: Annotated[str | None, typer.Option(help="Text to report on; --data by default.")] = None
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; best.yaml by default.")] = None
    set_: flags.Set = None


@dataclass(frozen=True)
class FinetuneFlags:
    """Fine-tuning after pruning. None means the default of `finetune`."""

    finetune: Annotated[bool, typer.Option("--finetune", help="Fine-tune with LoRA after pruning.")] = False
    finetune_data: Annotated[str | None, typer.Option(help=f"As `finetune --data`; `{ALPACA_GPT4}` by default.")] = None
    finetune_distil: Annotated[
        bool,
        typer.Option("--finetune-distil", help="As `finetune --distil`, with the dense model."),
    ] = False
    finetune_minutes: Annotated[float | None, typer.Option(help="Maximum training time in minutes.")] = None
    finetune_micro_batch: Annotated[
        int | None, typer.Option(help="As `finetune --micro-batch`; lower it to save memory.")
    ] = None
    finetune_batch: Annotated[int | None, typer.Option(help="As `finetune --batch`.")] = None
    finetune_learning_rate: Annotated[
        float | None, typer.Option(help="As `finetune --learning-rate`; small models need a higher one.")
    ] = None


@flags.grouped
def prune(
    model: Annotated[str, typer.Argument(help="A Hugging Face name, a folder, or `smollm2`.")],
    *,
    rate: Annotated[
        float | None, typer.Option(help="Pruning rate β: the share of decoder parameters to remove.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="In place of --rate: the most memory that the weights may take, such as `10GB`."),
    ] = None,
    parameters: Annotated[
        str | None, typer.Option(help="In place of --rate: the most parameters, such as `5B`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to create.")],
    search: SearchFlags,
    format_: flags.FormatNames = None,
    gguf_type: flags.GgufTypeFlag = None,
    training: FinetuneFlags,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing export.")] = False,
    json_: flags.Json = False,
) -> None:
    """Make a model smaller: search for the best pruning rates, export the pruned model and check it.

    After an interruption, the same command resumes where it left off.
    """
    _check_needed(training)
    formats = formats_of(format_ or ["hf"])
    destination = Destination(expanded(out), formats, gguf_type_of(formats, gguf_type), force)
    check_model(model)  # now, because torch takes seconds to import
    from daemon.launch.run import check_here, run_here

    if destination.folder.is_file():
        raise SettingsError(f"--out {out} is a file: name a folder that does not exist yet")
    size = {"rate": rate, "memory": memory, "parameters": parameters}
    settings = prune_settings(model, size, destination.folder, search)
    check_here(settings)
    tuning = _tuning(training, destination, settings) if training.finetune else None
    if tuning is not None:
        need("peft", "finetune")
    result = make_smaller(settings, destination, tuning, run_here, lambda: show_progress(settings.target.model))
    print_result(result.model_dump(mode="json"), json_, lambda: tables.pruned(result, settings.spec().fitness))
    if not json_:
        name_charts(settings)


ShowProgress = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]
"""Returns a context in which models run; its value is called with the progress of stages."""


def make_smaller(
    settings: Settings, destination: Destination, tuning: "Tuning | None", run_search: "RunSearch", show: ShowProgress
) -> PruneResult:
    """Search for the best rates, export the pruned model, fine-tune it if asked, and check it.

    After an interruption, a call with the same arguments resumes. Raises Interrupted, and SelfPrunerError.
    """
    need("torch", "worker")
    from gpu_worker.finetune.prune import check_before_search, finish, write_report
    from gpu_worker.finetune.prune_records import Goal

    goal = Goal(settings.search.name, settings.folder, settings.spec(), destination, tuning)
    goal, before = check_before_search(goal)
    try:
        request, summary, searched = _searched(settings, run_search)
        with show() as progress:
            finished = finish(goal, before, request, searched, progress)
        result = _result(goal.search, summary, searched, request, finished)
        write_report(result, goal.out)
    except Interrupted as end:
        end.left = RESUME_HINT
        raise
    return result


def _result(
    search: str, summary: Summary, searched: SearchSummary, request: PruningRequest, finished: "Finished"
) -> PruneResult:
    return PruneResult(
        search=search,
        evaluations=searched.evaluations,
        proposed_by_llm=summary.candidates["by_source"]["llm"],
        search_seconds=searched.seconds,
        uniform_perplexity=searched.uniform_perplexity,
        uniform_report_perplexity=searched.uniform_report_perplexity,
        uniform_kl=summary.uniform.kl,
        uniform_parameters=summary.uniform.parameters,
        reconstruction=request.spec.reconstruction,
        improved=summary.improved,
        dense_report_perplexity=summary.dense.report_perplexity,
        exported=finished.written.exported,
        finetuned=finished.written.finetuned,
        reloaded=finished.reloaded,
        runs_in_llama_cpp=finished.runs_in_llama_cpp,
    )


def _check_needed(given: FinetuneFlags) -> None:
    """Raise SettingsError if a flag of fine-tuning is given without --finetune."""
    names = [name for name, value in asdict(given).items() if value is not None and value is not False]
    if names and not given.finetune:
        raise SettingsError(f"--{names[0].replace('_', '-')} needs --finetune")


def finetune_recipe(data: str, given: FinetuneFlags, settings: Settings) -> Recipe:
    """Return the recipe for fine-tuning on `data`."""
    micro_batch = given.finetune_micro_batch
    how = RecipeFlags(
        batch=given.finetune_batch,
        micro_batch=RecipeFlags.micro_batch if micro_batch is None else micro_batch,
        learning_rate=given.finetune_learning_rate,
    )
    return recipe_of(data, how, full=False, distils=given.finetune_distil, seed=settings.search.seed)


def prune_settings(model: str, size: Mapping[str, object], out: Path, search: SearchFlags) -> Settings:
    """Return the settings of the search. Its default name is made from the folder and the spec.

    `size` has one of rate, memory and parameters, as in the settings of `target`; the others are None or missing.
    """
    config, overrides = search.config, search.set_ or []
    given_size = [name for name, value in size.items() if value is not None]
    if len(given_size) != 1:
        raise SettingsError(f"give one of --rate, --memory and --parameters, not {' and '.join(given_size) or 'none'}")
    chosen: dict[str, Any] = {"target.model": model, **{f"target.{name}": value for name, value in size.items()}}
    if (data := search.data) is not None:
        chosen |= {"data.calibration": data, "data.fitness": data, "data.report": search.report_data or data}
    elif search.report_data is not None:
        chosen["data.report"] = search.report_data
    with as_file(files("configs") / "best.yaml") as best:
        usual = load(best, _given({"target.model": model})).search.name
        if (budget := search.budget) is not None:
            without = _given(chosen | {"search.max_evaluations": None})
            given = load(config or best, without + overrides).search
            if budget < given.population:
                raise SettingsError(
                    f"--budget ({budget}) is smaller than the first population ({given.population}): raise it, "
                    "or lower --set search.population"
                )
            chosen |= {"search.max_evaluations": budget, "search.rounds": _rounds_for(budget, given)}
        values = _given(chosen) + overrides
        settings = load(config or best, values)
        is_named = "name" in settings.search.model_fields_set and (config is not None or settings.search.name != usual)
        if not is_named:
            words = re.sub(r"[^A-Za-z0-9._-]+", "-", out.name).strip("-")[:LONGEST_NAME]
            name = f"prune-{words}-{settings.spec().fingerprint[:6]}"
            settings = load(config or best, [*values, f"search.name={json.dumps(name)}"])
    return settings


def _given(chosen: dict[str, Any]) -> list[str]:
    """Return settings in the form of --set."""
    return [f"{name}={json.dumps(value)}" for name, value in chosen.items()]


def _rounds_for(budget: int, search: SearchSettings) -> int:
    """Return the number of rounds that `budget` evaluations need, but at least the number in the settings."""
    offspring = search.mutations + search.crossovers
    return max(search.rounds, math.ceil((budget - search.population) / offspring)) if offspring else search.rounds


def _tuning(given: FinetuneFlags, destination: Destination, settings: Settings) -> "Tuning":
    """Return the data and recipe of fine-tuning. Raises UsageError for flags and settings that it cannot use."""
    from gpu_worker.finetune.prune_records import Tuning

    data = given.finetune_data or ALPACA_GPT4
    recipe = finetune_recipe(data, given, settings)
    if destination.formats == ("gguf",):
        raise SettingsError("--finetune needs a format that can be trained: add --format hf")
    if settings.target.dtype == "float16":
        raise SettingsError("--finetune needs target.dtype bfloat16 or float32: gradients overflow in float16")
    check_minutes("--finetune-minutes", given.finetune_minutes)
    learned = found_data(data)
    check_apart("--finetune-data", learned, "data.fitness (--data)", settings.data.fitness)
    check_apart("--finetune-data", learned, "data.report (--report-data)", settings.data.report)
    return Tuning(data, recipe, given.finetune_minutes)


def _searched(settings: Settings, run_search: "RunSearch") -> tuple[PruningRequest, Summary, SearchSummary]:
    """Run or resume the search; return its best candidate as a request, its summary, and what its export says of it."""
    summary, interrupted = run_search(settings)
    if interrupted is not None:
        raise Interrupted(interrupted)
    if summary is None or not summary.finished:
        raise SelfPrunerError(f"the search was stopped before its end; {RESUME_HINT}")
    if summary.best is None:
        raise SelfPrunerError(f"no candidate could be measured; {settings.folder}/evaluations.jsonl says why")
    best = _best(settings, summary.rates)
    searched = search_summary(summary, record_of_best(settings.folder, str(best.get("id"))))
    return request_of_search(best, f"search {settings.search.name}"), summary, searched


def _best(settings: Settings, rates: tuple[float, ...]) -> dict[str, Any]:
    """Return best.json. Raises SelfPrunerError if it does not hold the best `rates`, for example after a full disk."""
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
