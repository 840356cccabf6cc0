"""Allocations without a search on SmolLM2: method × split × scoring × rate, all removing the same number of parameters.

    python -m benchmarks.micro.allocations --calibration VALIDATION.txt --report TEST.txt --out FILE.json
        [--rates 0.2 0.3] [--scorings dense] [--reconstruction least-squares]

Use a separate FILE.json for each reconstruction. Weights are scored on 32 windows of 1,024 tokens of the first text.
`fit` is measured on 4 other windows of that text, and `test` on 6 windows of 2,048 tokens of the second text. Each row
is saved when it is finished, and a restarted benchmark resumes.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import track
from rich.table import Table

from gpu_worker.evaluation.allocation import allocate
from gpu_worker.evaluation.session import Session
from gpu_worker.evaluation.target import Target
from gpu_worker.measuring.half_precision import products_in_float32
from protocol.plans.allocation import Allocation, Method
from protocol.plans.plan import Split
from protocol.plans.spec import Reconstruction, Scoring, SearchSpec, TextSpec

METHODS: tuple[Method, ...] = ("uniform", "first-layer", "owl", "llm-pruner", "sensitivity")
SPLITS: tuple[Split, ...] = ("equal", "mlp-first")
SCORINGS: tuple[Scoring, ...] = ("dense", "sequential")


@products_in_float32()
def main() -> None:
    """Measure the missing rows and print the table."""
    arguments = argparse.ArgumentParser(description="Allocations without a search.")
    arguments.add_argument("--calibration", type=Path, required=True, help="text for scoring, and for `fit`")
    arguments.add_argument("--report", type=Path, required=True, help="text for `test`")
    arguments.add_argument("--out", type=Path, required=True, help="JSON, one entry per row")
    arguments.add_argument("--rates", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5])
    arguments.add_argument("--scorings", choices=SCORINGS, nargs="+", default=list(SCORINGS))
    arguments.add_argument("--reconstruction", choices=get_args(Reconstruction), default="none")
    given = arguments.parse_args()
    rows: dict[str, Any] = json.loads(given.out.read_text()) if given.out.is_file() else {}
    # Dense scoring comes first, because it is quick and makes up most of the table.
    cells = [
        (rate, split, method, scoring)
        for scoring, rate, split, method in product(given.scorings, given.rates, SPLITS, METHODS)
        if name(rate, split, method, scoring) not in rows
    ]
    session = ready(spec_of(given, 0.3, "equal", "dense")) if cells else None
    for rate, split, method, scoring in track(cells, console=Console(stderr=True)):
        assert session is not None
        # The rates do not depend on the scoring, and sensitivity is measured on the model ordered by dense scores.
        dense = rows.get(name(rate, split, method, "dense"))
        spec = spec_of(given, rate, split, scoring)
        rows[name(rate, split, method, scoring)] = measure(session, spec, method, dense and dense["rates"])
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows, given.rates)


def name(rate: float, split: Split, method: Method, scoring: Scoring) -> str:
    """Return the key of a row."""
    return f"{rate} {split} {method} {scoring}"


def spec_of(given: argparse.Namespace, rate: float, split: Split, scoring: Scoring) -> SearchSpec:
    """Return the spec of a row; all rows have the same texts and dense scores."""
    fit = TextSpec(source=str(given.calibration.absolute()), windows=4, seqlen=1024)
    return SearchSpec(
        model="smollm2",
        rate=rate,
        split=split,
        scoring=scoring,
        reconstruction=given.reconstruction,
        calibration=fit.model_copy(update={"windows": 32}),
        fitness=fit,
        report=TextSpec(source=str(given.report.absolute()), windows=6, seqlen=2048),
    )


def ready(spec: SearchSpec) -> Session:
    """Load the model and compute the dense scores and outliers, which all rows share."""
    return Session(spec, sensitivity=False, target=Target(spec, outlier_threshold=5.0))


def measure(session: Session, spec: SearchSpec, method: Method, known: list[float] | None) -> dict[str, Any]:
    """Measure one row, with the rates of its method unless they are already known."""
    target = session.target
    target.spec = spec
    rates = tuple(known) if known else allocate(target, Allocation(method=method))
    plan = spec.plan(list(rates), target.shape)
    fit, test = session.evaluate(plan), session.evaluate(plan, "report")
    return {"fit": fit.perplexity, "test": test.perplexity, "parameters": fit.parameters.decoder_after, "rates": rates}


def show(rows: dict[str, Any], rates: list[float]) -> None:
    """Print one line per method, split and scoring: fit / test at each rate."""
    table = Table("method", "split", "scoring", *(f"{rate:.0%} fit / test" for rate in rates))
    for method, split, scoring in product(METHODS, SPLITS, SCORINGS):
        found = [rows.get(name(rate, split, method, scoring)) for rate in rates]
        table.add_row(method, split, scoring, *(f"{r['fit']:,.1f} / {r['test']:,.1f}" if r else "–" for r in found))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
