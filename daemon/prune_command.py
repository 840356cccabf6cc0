"""`selfpruner prune`: from model to smaller model in one command: search, export, fine-tune, load again and check."""

import json
import re
from dataclasses import dataclass
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer

from daemon import answers, flags
from daemon.card_claim import card_claim
from daemon.finetune_command import RecipeFlags, recipe_of
from daemon.pruning_commands import at_work
from daemon.pruning_request import PruningRequest, request_of_search
from daemon.run_here import run_here
from daemon.setting_sources import load
from daemon.settings import NAMED_TEXTS, Settings, check_text
from daemon.signals import Interrupted
from daemon.summary import Summary
from daemon.terminal import answer, need
from protocol.errors import SelfPrunerError, SettingsError
from protocol.finetuning import ALPACA_GPT4
from protocol.formats import Formats, GgufType, formats_of
from protocol.paths import expanded
from protocol.results import ExportResult, FinetuneResult, PruneResult

FURTHEST_OFF = 0.02
"""How far, as a share, a folder's perplexity may be from what was measured in memory; widths of kernels change sums."""
LONGEST_NAME = 48

log = structlog.get_logger()


@dataclass(frozen=True)
class _Goal:
    """What is to be there at the end."""

    out: Path
    formats: Formats
    gguf_type: GgufType
    force: bool


def prune(
    model: Annotated[str, typer.Argument(help="A hub name, a folder, or `smollm2`.")],
    rate: Annotated[float, typer.Option(help="The pruning rate β: the share of decoder parameters to remove.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    budget: Annotated[int | None, typer.Option(help="Evaluations of the search; the config's if left out.")] = None,
    data: Annotated[
        str | None, typer.Option(help="The text to score and to search on: `wikitext2`, `self`, or a text file.")
    ] = None,
    report_data: Annotated[str | None, typer.Option(help="The text to report on; --data if left out.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings; best.yaml if left out.")] = None,
    set_: flags.Set = None,
    format_: flags.FormatNames = None,
    gguf_type: Annotated[GgufType, typer.Option(help="gguf: how weights are stored.")] = "f16",
    finetune: Annotated[bool, typer.Option("--finetune", help="Recover by LoRA before the end.")] = False,
    finetune_data: Annotated[
        str | None, typer.Option(help=f"As `finetune --data`; `{ALPACA_GPT4}` if left out.")
    ] = None,
    finetune_minutes: Annotated[float | None, typer.Option(help="Of training, at most.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older export.")] = False,
    json_: flags.Json = False,
) -> None:
    """Make a model smaller: search for the best pruning rates, prune by them, write the model and check it.

    Killed or interrupted, the same command goes on where it was.
    """
    goal = _Goal(expanded(out), formats_of(format_ or ["hf"]), gguf_type, force)
    settings = prune_settings(model, rate, goal.out, budget, data, report_data, config, set_ or [])
    _check(goal, finetune=finetune, finetune_data=finetune_data, finetune_minutes=finetune_minutes)
    request, summary = _searched(settings)
    if finetune:
        exported, tuned = _finetuned(settings, request, goal, finetune_data or ALPACA_GPT4, finetune_minutes)
    else:
        exported, tuned = _export(request, goal), None
    result = PruneResult(
        search=settings.search.name,
        evaluations=sum(summary.candidates["by_outcome"].values()),
        search_seconds=summary.seconds,
        uniform_perplexity=summary.uniform.perplexity,
        uniform_report_perplexity=summary.uniform.report_perplexity,
        dense_report_perplexity=summary.dense.report_perplexity,
        exported=exported,
        finetuned=tuned,
        reloaded=_reloaded(goal, settings, tuned.finetuning.perplexity if tuned else exported.perplexity),
        runs_in_llama_cpp=_runs_in_llama_cpp(goal),
    )
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
    """The settings of the search; its name follows from the folder and from what decides a result."""
    chosen: dict[str, Any] = {"target.model": model, "target.rate": rate}
    if budget is not None:
        chosen["search.max_evaluations"] = budget
    if data is not None:
        chosen |= {"data.calibration": data, "data.fitness": data, "data.report": report_data or data}
    elif report_data is not None:
        chosen["data.report"] = report_data
    given = [f"{name}={json.dumps(value)}" for name, value in chosen.items()] + overrides
    with as_file(files("configs") / "best.yaml") as best:
        settings = load(config or best, given)
        if not any(override.partition("=")[0].strip() == "search.name" for override in overrides):
            words = re.sub(r"[^A-Za-z0-9._-]+", "-", out.name).strip("-")[:LONGEST_NAME]
            name = f"prune-{words}-{settings.spec().fingerprint[:6]}"
            settings = load(config or best, [*given, f"search.name={json.dumps(name)}"])
    return settings


def _check(goal: _Goal, *, finetune: bool, finetune_data: str | None, finetune_minutes: float | None) -> None:
    """Raise UsageError for what cannot be, before a search of hours."""
    if not finetune and (finetune_data, finetune_minutes) != (None, None):
        raise SettingsError("--finetune-data and --finetune-minutes are of --finetune, which is missing")
    if finetune and goal.formats == ("gguf",):
        raise SettingsError("--finetune needs a format that can be trained: give --format hf beside gguf")
    if finetune_data is not None and finetune_data not in (ALPACA_GPT4, *NAMED_TEXTS):
        check_text(finetune_data)
    need("torch", "worker")
    if finetune:
        need("peft", "finetune")
    from gpu_worker.export.folder import check_target

    check_target(goal.out, force=goal.force)


def _searched(settings: Settings) -> tuple[PruningRequest, Summary]:
    """The best of the search, which goes on from what is there of it."""
    summary, interrupted = run_here(settings)
    if interrupted is not None:
        end = Interrupted(interrupted)
        end.left = "the same command goes on where it was"
        raise end
    if summary is None or not summary.finished:
        raise SelfPrunerError("the search was stopped before its end; the same command goes on where it was")
    if summary.best is None:
        raise SelfPrunerError(f"no candidate could be measured; {settings.folder}/evaluations.jsonl says why")
    record = json.loads((settings.folder / "best.json").read_bytes())
    return request_of_search(record), summary


def _export(request: PruningRequest, goal: _Goal) -> ExportResult:
    with at_work(request.spec.model) as progress:
        from gpu_worker.exporter import Destination, export_once

        return export_once(
            request.spec,
            request.choice,
            Destination(goal.out, goal.formats, goal.gguf_type, goal.force),
            shape=request.shape,
            method=request.method,
            progress=progress,
        )


def _finetuned(
    settings: Settings, request: PruningRequest, goal: _Goal, data: str, minutes: float | None
) -> tuple[ExportResult, FinetuneResult]:
    """Export into the search's folder, where a second start finds it, and from there fine-tune into the goal."""
    pruned = settings.folder / "pruned"
    kept = settings.folder / "pruned.json"
    if kept.is_file() and (pruned / "selfpruner.json").is_file():
        exported = ExportResult.model_validate_json(kept.read_bytes())
    else:
        trained: Formats = tuple(fmt for fmt in goal.formats if fmt != "gguf")
        exported = _export(request, _Goal(pruned, trained, goal.gguf_type, force=True))
        kept.write_text(exported.model_dump_json() + "\n")
    fitness = request.spec.fitness
    try:
        with at_work(str(pruned)) as progress:
            from gpu_worker.finetune.finetuning import EvalText, FinetuneRequest, finetune_once
            from gpu_worker.finetune.training import Limits

            measured = None if fitness.source == "self" else EvalText(fitness.source, fitness.windows, fitness.seqlen)
            tuned = finetune_once(
                FinetuneRequest(
                    folder=pruned,
                    data=data,
                    recipe=recipe_of(data, RecipeFlags(), full=False, seed=request.spec.seed),
                    out=goal.out,
                    formats=goal.formats,
                    gguf_type=goal.gguf_type,
                    force=goal.force,
                    eval_text=measured,
                    limits=Limits(None if minutes is None else 60 * minutes),
                ),
                progress,
            )
    except Interrupted as end:
        end.left = "the same command goes on where it was"
        raise
    return exported, tuned


def _runs_in_llama_cpp(goal: _Goal) -> bool | None:
    """Whether llama.cpp writes with the GGUF file; None without either. Raises ModelError where it cannot."""
    if "gguf" not in goal.formats or find_spec("xllamacpp") is None:
        return None
    with at_work(str(goal.out)):
        from gpu_worker.speed.llama_cpp_engine import check_gguf_runs

        check_gguf_runs(next(goal.out.glob("*.gguf")))
    return True


def _reloaded(goal: _Goal, settings: Settings, expected: Any) -> float | None:
    """What the folder measures when it is loaded again; None of a GGUF alone.

    Raises SelfPrunerError where that is not what it measured in memory.
    """
    if goal.formats == ("gguf",):
        return None
    wanted = expected if isinstance(expected, float | None) else expected.after
    source = settings.data.fitness
    claim = card_claim(str(goal.out), flags.TextFlags(data=None if source in NAMED_TEXTS else source))
    if claim is None or wanted is None:
        return None
    with at_work(str(goal.out)) as progress:
        from gpu_worker.evaluate import evaluate_as_it_is

        found = evaluate_as_it_is(
            str(goal.out),
            {"fitness": claim.texts["fitness"]} if claim.kept_text else claim.texts,
            dtype=claim.dtype,
            seed=claim.seed,
            kept_text=claim.kept_text,
            progress=progress,
        ).perplexity
    if abs(found / wanted - 1) > FURTHEST_OFF:
        raise SelfPrunerError(
            f"{goal.out} measures {found:.4g} where the model measured {wanted:.4g} before it was written"
        )
    return found
