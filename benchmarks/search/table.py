"""The table of benchmarks/search/compare_search.py."""

import statistics
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from protocol.plans.allocation import uniform_label
from protocol.plans.spec import Measure, Reconstruction

LABELS = {"ranked": "ranked (choosing from the LLM's menus at random)"}
"""Longer names of methods, for the table."""


def show(results: list[dict[str, Any]], rate: float, measure: Measure, reconstruction: Reconstruction) -> None:
    """Print one row per method: medians over seeds, and ratios to uniform rates with the same reconstruction.

    The last rows are the uniform baselines with the same number of parameters, and the dense model.
    """
    digits, uniform = 4 if measure == "kl" else 2, uniform_label(reconstruction)
    seeds = len({r["seed"] for r in results})
    over = f"median over {seeds} seeds (lowest to highest)" if seeds > 1 else "one seed"
    table = Table(title=f"β = {rate:g}: the best by {measure}, {over}")
    table.add_column("method", no_wrap=True)
    for column in (
        f"ratio to\n{uniform}",
        "fitness",
        "reported\nperplexity",
        "as good as\nevolution after",
        "replies\nreadable",
        "replies\naccepted",
        "tokens a\ncandidate",
        "seconds",
        "worker\nbusy",
        "tokens\nmeasured",
    ):
        table.add_column(column, justify="right")
    goal = {r["seed"]: r["best_so_far"]["fitness"][-1] for r in results if r["method"] == "evolution"}
    for method in dict.fromkeys(r["method"] for r in results):
        rows = [r for r in results if r["method"] == method]
        table.add_row(
            LABELS.get(method, method),
            _median((r["report"] / r["uniform_report"] for r in rows), digits=3),
            _median((r["best_so_far"]["fitness"][-1] for r in rows), digits),
            _median(r["report"] for r in rows),
            _median((_reached(r, goal[r["seed"]]) for r in rows if r["seed"] in goal), digits=0),
            _share(rows, "readable", "asked"),
            _share(rows, "accepted", "asked"),
            _share(rows, "completion_tokens", "by_llm", digits=0),
            _median((r["seconds"] for r in rows), 0),
            _median((r["busy"] for r in rows), 2),
            _median((r["tokens"] for r in rows), 0),
        )
    each = list({r["seed"]: r for r in results}.values())
    table.add_row(
        uniform, "1.000", _median((r["uniform"] for r in each), digits), _median(r["uniform_report"] for r in each)
    )
    others = {"uniform, any heads (masked)": "any_heads_report", "dense": "dense_report"}
    if reconstruction != "none":
        others = {"uniform, rectangular": "plain_report", **others}
    for label, figure in others.items():
        ratio = _median((r[figure] / r["uniform_report"] for r in each), digits=3)
        table.add_row(label, ratio, "", _median(r[figure] for r in each))
    Console(width=190).print(table)


def _median(values: Iterator[float], digits: int = 2) -> str:
    found = sorted(values)
    if not found:
        return "–"

    def shown(value: float) -> str:
        return "never" if value == float("inf") else f"{value:,.{digits}f}"

    middle = shown(statistics.median_high(found))
    return middle if len(found) == 1 else f"{middle}\n({shown(found[0])}–{shown(found[-1])})"


def _reached(result: dict[str, Any], goal: float) -> float:
    """Return the number of evaluations after which the best fitness reached `goal`; infinity if it never did."""
    so_far = result["best_so_far"]
    steps = zip(so_far["evaluations"], so_far["fitness"], strict=True)
    return next((n for n, fitness in steps if fitness <= goal), float("inf"))


def _share(rows: list[dict[str, Any]], part: str, whole: str, digits: int = 2) -> str:
    total = sum(r[whole] for r in rows)
    return f"{sum(r[part] for r in rows) / total:.{digits}f}" if total else ""
