"""Does the LLM find better pruning rates than evolution, CMA-ES or random search with as many evaluations?

    python benchmarks/search/compare_search.py --rate 0.3 --budget 60 --seeds 1 --json OUT
    python benchmarks/search/compare_search.py --rate 0.3 0.5 --fitness VALID.txt --report TEST.txt --out DIR

Every method is a whole search of the daemon, through a real queue. One process measures for all of them, and measures
a plan that two methods propose only once. Searches minimise the divergence from the dense model, as in
configs/best.yaml, and report perplexity. Prints a table; DIR gets the searches, the figures and the plots. After an
interruption the same command resumes. Without texts, the model is scored and searched on text that it generates.

A long comparison can be split between machines, each with some of the methods, rates or seeds (`--first-seed`). Join
their figures with

    python -m benchmarks.search.compare_search --methods --beside ONE/comparison.json OTHER/comparison.json --out DIR

Exit code 1: measuring failed. 2: invalid input. 130, 143: interrupted.
"""

import argparse
import asyncio
import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import product
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from rich.console import Console

from agents.prompting.settings import FeedbackPart
from benchmarks.output_folder import lock_folder
from benchmarks.search.searches import (
    Comparison,
    MeasuringWorker,
    SearchResult,
    keep_result,
    plain_uniform,
    result_before,
    result_of,
)
from benchmarks.search.table import show, show_progress
from daemon.launch.launch import Launch
from daemon.local.llm_server import find_gguf
from daemon.local.services import local_llm
from daemon.local.valkey import embedded_server
from daemon.search.checks import is_searched_on
from daemon.settings.errors import validation_sentence
from daemon.settings.llm import EndpointSettings
from daemon.settings.settings import Settings
from daemon.settings.target import check_text, text_spec
from protocol.errors import SelfPrunerError, SettingsError, UsageError
from protocol.plans.spec import Dtype, Measure, Reconstruction
from protocol.runtime import logs
from protocol.runtime.files import write_atomically
from protocol.runtime.signals import run_until_signal

SEEDS = ("first-layer", "llm-pruner", "owl", "uniform")
MIN_POPULATION = 4
OFFSPRING = 4
"""Candidates per round."""
METHODS: dict[str, dict[str, Any]] = {
    "random": {"proposer": "random", "mutations": OFFSPRING, "crossovers": 0},
    "evolution": {"proposer": "evolution", "mutations": OFFSPRING, "crossovers": 0},
    "evolution-multi": {"proposer": "evolution", "mutations": OFFSPRING, "crossovers": 0, "first_windows": 2},
    "cma-es": {"proposer": "cma-es", "mutations": 16, "crossovers": 0},
    "best-of-n": {"proposer": "best-of-n", "mutations": OFFSPRING, "crossovers": 0, "reply": "edits"},
    "rules": {"initializer": "rules", "selector": "tournament", "mutator": "rules", "crossover": "rules"},
    "ranked": {"initializer": "random", "selector": "tournament", "mutator": "ranked", "crossover": "ranked"},
    "plans": {"initializer": "plans", "selector": "tournament", "mutator": "plans", "crossover": "ranked"},
    "rules-first": {"initializer": "rules", "selector": "tournament", "mutator": "plans", "crossover": "ranked"},
    "llm-edits": {"reply": "edits"},
    "llm": {"reply": "moves"},
    "llm-rules": {"reply": "rules"},
    "llm-share": {"reply": "moves", "share": 0.3, "initializer": "plans", "selector": "tournament"},
    "llm-no-feedback": {"reply": "moves", "feedback": ()},
    "llm-steady": {"reply": "moves", "mode": "steady-state"},
    "plans-multi": {
        "initializer": "plans",
        "selector": "tournament",
        "mutator": "plans",
        "crossover": "ranked",
        "first_windows": 2,
    },
    "llm-share-multi": {
        "reply": "moves",
        "share": 0.3,
        "initializer": "plans",
        "selector": "tournament",
        "first_windows": 2,
    },
    "no-initializer": {"reply": "moves", "initializer": "random"},
    "no-mutation": {"reply": "moves", "mutations": 0, "crossovers": OFFSPRING},
    "no-crossover": {"reply": "moves", "mutations": OFFSPRING, "crossovers": 0},
    "tournament": {"reply": "edits", "selector": "tournament"},
    "joint": {"reply": "edits", "selector": "none"},
}
"""Settings of search.* and llm.*. `ranked` chooses at random from the menus that `llm` chooses from, and selects
parents by tournaments. `rules` is genetic programming over rules, and such choices in turn; `llm-rules` is the same
with the LLM. `plans` is the optimiser alone, `rules-first` the same after first candidates from rules, `llm-share`
gives the LLM 30 % of its offspring. `llm` asks it for all. `-multi` measures candidates in part first.
The methods after these are ablations, each of which changes one thing. `tournament` and `joint` are ablations of
`llm-edits`, because with any selection moves mostly begin at the best configuration. CMA-ES has larger generations,
because it is designed for them."""
RACING_FACTOR = 5
"""Methods with `first_windows` may make this many times the candidates of others, on the same number of tokens."""
DEFAULT_METHODS = ("random", "evolution", "cma-es", "best-of-n", "ranked", "plans", "llm", "llm-share")
OF_LLM = ("reply", "feedback", "share", "what_if")
NOT_OF_THE_SEARCHES = ("out", "json", "beside")
SHARED_OUT = ("rate", "seeds", "first_seed", "methods", "llm_url")
"""Arguments in which joined calls may differ."""
WHICH_LLM = ("llm_url", "llm_model", "gguf")
WITHOUT_LLM = (
    "random",
    "evolution",
    "evolution-multi",
    "cma-es",
    "ranked",
    "plans",
    "plans-multi",
    "rules",
    "rules-first",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, nargs="+", default=[0.3])
    parser.add_argument("--budget", type=int, default=200, help="evaluations of each search")
    parser.add_argument("--seeds", type=int, default=3, help="searches of each method, each with its own windows")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed; another call has the lower ones")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(DEFAULT_METHODS))
    parser.add_argument("--beside", type=Path, nargs="+", default=[], help="comparison.json of other calls, to join")
    parser.add_argument("--granularity", choices=("layer", "block"), default="block")
    parser.add_argument("--reconstruction", choices=get_args(Reconstruction), default="least-squares")
    parser.add_argument("--minimise", choices=get_args(Measure), default="kl", help="the fitness")
    parser.add_argument("--allocations", nargs="*", default=list(SEEDS), help="search.seeds of all methods")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    parser.add_argument("--fitness", default="self", help="the text to score on and to search on")
    parser.add_argument("--report", default="self", help="the text to report on")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--report-windows", type=int, default=6)
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--llm-url", help="an OpenAI-compatible endpoint (default: a local LLM)")
    parser.add_argument("--llm-model", default="default")
    parser.add_argument("--gguf", default="smollm2", help="the local LLM")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the missing searches, print the table, write figures and plots. Return the exit code."""
    given = _parser().parse_args(arguments)
    logs.configure(level="WARNING")
    try:
        return _make(given)
    except ValidationError as error:
        _print_error(validation_sentence(error))
        return 2
    except SelfPrunerError as error:
        _print_error(str(error))
        return 2 if isinstance(error, UsageError) else 1
    finally:
        sys.excepthook = sys.__excepthook__  # the hook of the logs would write to the log of the last search


def _make(given: argparse.Namespace) -> int:
    if not given.methods and not given.beside:
        raise SettingsError("there is nothing to do: name methods, or figures to join with --beside")
    _check(given)
    others = {file: _read(file) for file in given.beside}
    arguments = {k: v for k, v in vars(given).items() if k not in NOT_OF_THE_SEARCHES}
    if not given.methods:
        arguments = others[given.beside[0]].arguments
    for file, other in others.items():
        if differing := sorted(
            name for name in {*other.arguments, *arguments} if _differs(name, other.arguments, arguments)
        ):
            raise SettingsError(f"{file} is of other searches: they differ in {', '.join(differing)}")
    with lock_folder(given.out, f"the comparison in {given.out} is being made by another process"):
        own: list[SearchResult] = []
        if given.methods:
            found, number = run_until_signal(compare(given))
            if found is None:
                _print_error("interrupted; run the same command again to resume" if number else "a search was stopped")
                return 128 + number if number else 1
            own = found
        _show_all([*(result for other in others.values() for result in other.results), *own], arguments, given)
    return 0


def _check(given: argparse.Namespace) -> None:
    """Raise UsageError or ValidationError for invalid input, before anything is loaded."""
    if given.budget < MIN_POPULATION:
        raise SettingsError(f"--budget cannot be {given.budget}: the first population takes {MIN_POPULATION}")
    if given.seeds < 1:
        raise SettingsError(f"--seeds cannot be {given.seeds}: give 1 or more")
    if given.json and not given.json.parent.is_dir():
        raise SettingsError(f"--json {given.json} cannot be written: there is no folder {str(given.json.parent)!r}")
    if not given.methods:
        return
    for text in (given.fitness, given.report):
        check_text(text)
    if is_searched_on(given.report, given.fitness):
        _print_error(f"--report {given.report} is the text that is searched on: it cannot show overfitting")
    seeds = (given.first_seed, given.first_seed + given.seeds - 1)
    for method, rate, seed in product(given.methods, given.rate, seeds):
        settings = settings_of(given, method, rate, seed)
        settings.spec()
        if settings.search.asks_llm and not given.llm_url:
            find_gguf(given.gguf)


def _read(file: Path) -> Comparison:
    """Read the figures of another call. Raise SettingsError."""
    try:
        found = Comparison.model_validate_json(file.read_bytes())
    except OSError as error:
        raise SettingsError(f"--beside {file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise SettingsError(
            f"--beside {file} holds no figures of a comparison: {where and where + ': '}{problem['msg']}"
        ) from error
    if found.arguments.get("minimise") not in get_args(Measure):
        raise SettingsError(f"--beside {file} does not say what was minimised")
    if found.arguments.get("reconstruction") not in get_args(Reconstruction):
        raise SettingsError(f"--beside {file} does not say what was reconstructed")
    return found


def _show_all(found: list[SearchResult], arguments: dict[str, Any], given: argparse.Namespace) -> None:
    """Print the tables, write the figures and the plots. If a search occurs twice, the last one counts."""
    joined = {_which(result): result for result in found}
    results = [joined[which].model_dump() for which in sorted(joined, key=_in_order)]
    figures = {"arguments": arguments, "results": results}
    for file in filter(None, (given.out / "comparison.json", given.json)):
        write_atomically(file, json.dumps(figures, indent=1) + "\n")
    for rate in dict.fromkeys(r["rate"] for r in results):
        show(
            [r for r in results if r["rate"] == rate],
            rate,
            arguments["minimise"],
            arguments["reconstruction"],
        )
        show_progress([r for r in results if r["rate"] == rate], rate, WITHOUT_LLM)
    plot(results, given.out)


def _differs(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether the argument `name` makes the searches incomparable; the folders of texts do not matter."""
    if name in SHARED_OUT:
        return False
    if name in ("fitness", "report"):
        return Path(str(theirs.get(name))).name != Path(str(ours.get(name))).name
    return bool(theirs.get(name) != ours.get(name))


def _which(result: SearchResult) -> tuple[str, float, int]:
    return result.method, result.rate, result.seed


def _in_order(which: tuple[str, float, int]) -> tuple[float, int, int]:
    method, rate, seed = which
    names = [*METHODS, method]  # joined figures may have a method that no longer exists
    return rate, names.index(method), seed


async def compare(given: argparse.Namespace) -> list[SearchResult]:
    """Return all searches, including finished ones; if cancelled, the next call resumes."""
    results: list[SearchResult] = []
    async with AsyncExitStack() as stack:
        endpoints: tuple[EndpointSettings, ...] = ()
        if any(method not in WITHOUT_LLM for method in given.methods):
            endpoints = await _endpoints(given, stack)
        url = await stack.enter_async_context(embedded_server(given.out / "server"))
        console = Console(stderr=True)
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            worker = MeasuringWorker(url, given.out / f"measured-{seed}.jsonl")
            specs = [settings_of(given, "random", rate, seed).spec() for rate in given.rate]
            plain = await asyncio.to_thread(plain_uniform, specs, given.out / f"plain-{seed}.json")
            for (rate, uniform), method in product(zip(given.rate, plain, strict=True), given.methods):
                settings = settings_of(given, method, rate, seed)
                if (before := result_before(settings.folder)) is not None:
                    results.append(before)
                    continue
                console.print(f"{settings.search.name} …")
                settings.folder.mkdir(parents=True, exist_ok=True)
                logs.configure(file=settings.folder / "log.jsonl", console=False, search=settings.search.name)
                async with worker.serving(settings):
                    launch = Launch(settings, url, endpoints, embedded=False)
                    summary = await launch.run()
                if summary is None or not summary.finished:
                    raise asyncio.CancelledError  # the search caught the cancellation and saved its state
                results.append(result_of(settings, method, summary, uniform, worker.measured_by))
                keep_result(results[-1], settings.folder, _decisive(given, method))
                console.print(
                    f"  best {results[-1].best_so_far.fitness[-1]:.4g}, reported {results[-1].report:.2f}, "
                    f"{summary.seconds:.0f} s"
                )
    return results


def _decisive(given: argparse.Namespace, method: str) -> dict[str, Any]:
    """Return everything that determines the result of a search of `method`, except rate and seed."""
    beside = (*NOT_OF_THE_SEARCHES, *SHARED_OUT, *WHICH_LLM)
    decisive = {name: value for name, value in vars(given).items() if name not in beside}
    decisive |= {name: text_spec(decisive[name], None, given.seqlen).source for name in ("fitness", "report")}
    if method not in WITHOUT_LLM:
        decisive["llm"] = {"url": given.llm_url, "model": given.llm_model} if given.llm_url else {"gguf": given.gguf}
    return decisive | {"method": METHODS[method]}


def _name(given: argparse.Namespace, method: str, rate: float, seed: int) -> str:
    """Return the name of a search and its folder. Other arguments give another name, so no old search is resumed."""
    arguments = json.dumps(_decisive(given, method), sort_keys=True)
    digest = hashlib.sha256(arguments.encode()).hexdigest()[:8]
    return f"{method}-{given.granularity}-{rate:g}-{seed}-{digest}"


async def _endpoints(given: argparse.Namespace, stack: AsyncExitStack) -> tuple[EndpointSettings, ...]:
    asking = next(method for method in given.methods if method not in WITHOUT_LLM)
    settings = settings_of(given, asking, given.rate[0], given.first_seed)
    if settings.llm.endpoints:
        return settings.llm.endpoints
    settings.folder.mkdir(parents=True, exist_ok=True)  # for the log of the local LLM
    return ((await stack.enter_async_context(local_llm(settings))).endpoint,)


def settings_of(given: argparse.Namespace, method: str, rate: float, seed: int) -> Settings:
    """Return the settings of one search. Methods differ in the values of METHODS, and with races in the budget."""
    chosen = {"mutations": OFFSPRING - 1, "crossovers": 1, **METHODS[method]}
    endpoint = {"base_url": given.llm_url, "model": given.llm_model, "name": "llm"}
    llm = {
        "feedback": get_args(FeedbackPart),
        "endpoints": [endpoint] if given.llm_url else [],
    }
    llm |= {name: chosen.pop(name) for name in OF_LLM if name in chosen}
    population = max(MIN_POPULATION, min(12, given.budget // 4))
    in_part = "first_windows" in chosen
    most = given.budget * (RACING_FACTOR if in_part else 1)
    return Settings.model_validate(
        {
            "search": {
                "name": _name(given, method, rate, seed),
                "seed": seed,
                "population": population,
                "rounds": -(-(most - population) // OFFSPRING),
                "max_evaluations": most,
                "max_tokens": given.budget * given.windows * (given.seqlen - 1) if in_part else None,
                "granularity": given.granularity,
                "fitness": given.minimise,
                "reconstruction": given.reconstruction,
                "seeds": given.allocations,
                **chosen,
            },
            "target": {"model": given.model, "rate": rate, "dtype": given.dtype},
            "data": {
                "calibration": given.fitness,
                "calibration_windows": given.calibration_windows,
                "fitness": given.fitness,
                "fitness_windows": given.windows,
                "report": given.report,
                "report_windows": given.report_windows,
                "seqlen": given.seqlen,
            },
            "llm": {"max_tokens": 300, "concurrency": 2, **llm},
            "local_llm": {"gguf": given.gguf},
            "http": {"enabled": False},
            "run": {"folder": str(given.out)},
        }
    )


def plot(results: list[dict[str, Any]], folder: Path) -> None:
    """Write the plots if matplotlib is installed."""
    try:
        from benchmarks.search.plots import plot_convergence, plot_rates
    except ImportError:
        Console(stderr=True).print("no plots: pip install matplotlib")
        return
    for rate in dict.fromkeys(r["rate"] for r in results):
        of_rate = [r for r in results if r["rate"] == rate]
        plot_convergence(of_rate, folder / f"convergence-{rate:g}.png")
        plot_rates(of_rate, folder / f"rates-{rate:g}.png")


def _print_error(sentence: str) -> None:
    print(f"compare_search: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
