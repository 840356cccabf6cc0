"""Does a rule carry over? Tunes a rule on some models and rates, and measures it on others without any search.

    python -m benchmarks.search.rules --fitness VALID.txt --out DIR
    python -m benchmarks.search.rules --fitness VALID.txt --out DIR --tune smollm2:0.3 smollm2:0.5
        --test smollm2:0.2 smollm2:0.4 gemma.gguf:0.3:6

A case is MODEL:RATE or MODEL:RATE:WINDOWS. CMA-ES minimises the mean, over the cases of --tune, of the rule's
divergence divided by that of the best allocation of the case. The table compares the tuned rule, the rule that ships,
and the allocations on all cases, the cases of --test with windows of another seed. At block granularity, with least
squares.

Each measurement is saved when it is finished. After an interruption the same command resumes, and finished cases
load no model.

Exit code 2: invalid input.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
from cmaes import CMA
from rich.console import Console
from rich.progress import track
from rich.table import Table

from agents.baselines.seeds import seed_rates
from agents.population.view import View
from benchmarks.output_folder import lock_folder
from daemon.settings.rules import read_rule
from daemon.settings.target import check_text
from gpu_worker.evaluation.session import Session
from gpu_worker.measuring.half_precision import products_in_float32
from protocol.errors import SelfPrunerError, SettingsError, UsageError
from protocol.plans.allocation import Allocation, Method
from protocol.plans.candidate import candidate_id
from protocol.plans.profile import ModelProfile
from protocol.plans.rule import DEFAULT_RULE, Rule
from protocol.plans.spec import Dtype, SearchSpec, TextSpec
from protocol.runtime.files import AppendOnlyFile, write_atomically

ALLOCATIONS: tuple[Method, ...] = ("uniform", "first-layer", "owl", "llm-pruner", "sensitivity")
FORM = (
    "least_damage - 0.05*attention - 0.02*sensitivity - 0.02*influence - 0.02*outliers - 0.05*first*mlp"
    " + 0.02*depth*attention + 0.02*depth*mlp"
)
"""The form whose numbers are tuned, with the numbers to begin with."""
SIGMA = 0.05
SEQLEN = 256
CALIBRATION_WINDOWS = 64
TEST_SEED = 1000
"""Added to the seed of the windows on which rules are tested, so that no rule is tested on windows it was tuned on."""


class Case:
    """A model, a rate and windows: measures plans, and remembers every figure in the folder."""

    def __init__(self, name: str, fitness: str, seed: int, dtype: Dtype, folder: Path) -> None:
        self.name = name
        model, rate, windows = _parts(name)
        self.spec = SearchSpec(
            model=model,
            rate=rate,
            granularity="block",
            reconstruction="least-squares",
            measure="kl",
            dtype=dtype,
            calibration=TextSpec(source=fitness, windows=CALIBRATION_WINDOWS, seqlen=SEQLEN),
            fitness=TextSpec(source=fitness, windows=windows, seqlen=SEQLEN),
            seed=seed,
        )
        stem = f"{Path(model).stem}-{rate:g}-{self.spec.fingerprint}"
        self._file, self._profile_file = folder / f"{stem}.jsonl", folder / f"{stem}.json"
        self._known: dict[str, float] = {}
        if self._file.exists():
            lines = self._file.read_text().splitlines(keepends=True)
            self._known = dict(json.loads(line) for line in lines if line.endswith("\n"))  # the last may be cut off
        self._session: Session | None = None
        if not self._profile_file.exists():
            write_atomically(self._profile_file, self._loaded().profile.model_dump_json())
        profile = ModelProfile.model_validate_json(self._profile_file.read_bytes())
        self.view = View(self.spec, profile, 0, ())

    def _loaded(self) -> Session:
        if self._session is None:
            self._session = Session(self.spec, sensitivity=not self._profile_file.exists())
        return self._session

    def unload(self) -> None:
        """Free the model."""
        self._session = None

    def divergence(self, rates: tuple[float, ...]) -> float:
        """Return the KL divergence from the dense model of the plan nearest to `rates`, in nats per token."""
        shape = self.view.profile.shape
        plan = self.spec.plan(self.spec.feasible(rates, shape), shape)
        id_ = candidate_id(plan, self.spec.fingerprint)
        if id_ not in self._known:
            found = self._loaded().evaluate(plan).kl
            assert found is not None, "the spec measures divergence"
            self._known[id_] = found
            file = AppendOnlyFile(self._file)
            file.append(json.dumps([id_, found]) + "\n")
            file.close()
        return self._known[id_]

    def of_allocation(self, method: Method) -> float:
        """Return the divergence of an allocation."""
        return self.divergence(seed_rates(Allocation(method=method), self.view))

    def of_rule(self, rule: Rule) -> float:
        """Return the divergence of a rule."""
        return self.divergence(rule.rates(self.view.features))

    def best_allocation(self) -> float:
        """Return the divergence of the best allocation."""
        return min(self.of_allocation(method) for method in ALLOCATIONS)


def _parts(case: str) -> tuple[str, float, int]:
    """Return model, rate and windows. Raises SettingsError."""
    model, *rest = case.split(":")
    try:
        rate, windows = float(rest[0]), int(rest[1]) if len(rest) == 2 else 10
        if not model or len(rest) > 2 or not 0 < rate <= 0.9 or windows < 1:
            raise ValueError
    except (ValueError, IndexError):
        raise SettingsError(f"a case is MODEL:RATE or MODEL:RATE:WINDOWS, not {case!r}") from None
    return model, rate, windows


def tune(form: Rule, cases: list[Case], evaluations: int, seed: int) -> list[tuple[float, Rule]]:
    """Return the rules that CMA-ES tried, best first, each with its mean ratio to the cases' best allocations."""
    start = np.array(form.numbers)
    optimizer = CMA(start, SIGMA, seed=seed + 1)
    best = [case.best_allocation() for case in cases]
    tried: list[tuple[float, Rule]] = []
    samples: list[tuple[Any, float]] = []
    for i in track(range(evaluations), "tuning", console=Console(stderr=True)):
        sample = start if i == 0 else optimizer.ask()
        rule = form.with_numbers(sample.tolist())
        ratio = statistics.fmean(case.of_rule(rule) / b for case, b in zip(cases, best, strict=True))
        tried.append((ratio, rule))
        samples.append((sample, ratio))
        if len(samples) == optimizer.population_size:
            optimizer.tell(samples)
            samples = []
    return sorted(tried, key=lambda pair: pair[0])


def show(rows: dict[str, dict[str, float]], rules: dict[str, Rule], tuned_on: set[str]) -> None:
    """Print the divergences of all cases, and the ratio of each rule to the best allocation of each case."""
    console = Console(width=150)
    table = Table(title="KL divergence from the dense model, in nats per token; no search")
    table.add_column("")
    for case in rows:
        table.add_column(case + (" (tuned on)" if case in tuned_on else ""), justify="right")
    best = {case: min(figures[method] for method in ALLOCATIONS) for case, figures in rows.items()}
    for name in (*ALLOCATIONS, *rules):
        cells = []
        for case, figures in rows.items():
            ratio = f" ({figures[name] / best[case]:.3f})" if name in rules else ""
            cells.append(f"{figures[name]:.4f}{ratio}")
        table.add_row(name, *cells)
    console.print(table)
    console.print("in brackets: divided by the best allocation of the case")
    for name, rule in rules.items():
        held_out = [figures[name] / best[case] for case, figures in rows.items() if case not in tuned_on]
        mean = f"; geometric mean of the ratios on other cases {_mean(held_out):.3f}" if held_out else ""
        console.print(f"{name}: {rule}{mean}", soft_wrap=True)


def _mean(ratios: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios)))


@products_in_float32()
def main() -> int:
    """Tune, measure, print the table. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fitness", required=True, help="the text to score and to measure on")
    parser.add_argument("--tune", nargs="*", default=["smollm2:0.3", "smollm2:0.5"], help="cases to tune on")
    parser.add_argument("--test", nargs="*", default=["smollm2:0.2", "smollm2:0.4"], help="cases to test on")
    parser.add_argument("--form", default=FORM, help="the rule whose numbers are tuned")
    parser.add_argument("--rule", nargs="*", default=[], help="more rules to measure: texts or files")
    parser.add_argument("--evaluations", type=int, default=60, help="rules that CMA-ES tries")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="seed of the windows and of CMA-ES")
    parser.add_argument("--out", type=Path, default=Path("runs/rules"))
    given = parser.parse_args()
    try:
        check_text(given.fitness)
        source, form = str(Path(given.fitness).absolute()), read_rule(given.form)
        rules = {f"rule {i + 1}": read_rule(text) for i, text in enumerate(given.rule)}
        for case in (*given.tune, *given.test):
            _parts(case)
        with lock_folder(given.out, f"the rules in {given.out} are being measured by another process"):
            tried: list[tuple[float, Rule]] = []
            if given.tune:
                cases = [Case(name, source, given.seed, given.dtype, given.out) for name in given.tune]
                tried = tune(form, cases, given.evaluations, given.seed)
                del cases
            rules |= {"default": DEFAULT_RULE, **({"tuned": tried[0][1]} if tried else {})}
            rows: dict[str, dict[str, float]] = {}
            for name in (*given.tune, *given.test):
                seed = given.seed if name in given.tune else given.seed + TEST_SEED
                case = Case(name, source, seed, given.dtype, given.out)
                by_method = ((str(method), case.of_allocation(method)) for method in ALLOCATIONS)
                rows[name] = dict(by_method) | {label: case.of_rule(rule) for label, rule in rules.items()}
                case.unload()
            record = {"rules": [{"rule": str(rule), "ratio": ratio} for ratio, rule in tried[:20]], "cases": rows}
            write_atomically(given.out / "rules.json", json.dumps(record, indent=1) + "\n")
        show(rows, rules, set(given.tune))
    except SelfPrunerError as error:
        Console(stderr=True).print(f"rules: {error}", soft_wrap=True)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
