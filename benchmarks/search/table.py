"""The table of benchmarks/search/compare_search.py."""

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from protocol.plans.allocation import uniform_label
from protocol.plans.spec import Measure, Reconstruction

BySeed = dict[int, dict[str, Any]]
"""Results of one method by their seeds."""
SHARES_OF_BUDGET = (0.2, 0.4, 0.6, 1)
"""After which shares of the budget methods are compared."""
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


def show_progress(results: list[dict[str, Any]], rate: float, without_llm: Collection[str]) -> None:
    """Print the best so far, as a share of uniform's, after a fifth to all of the budget, and compare seed by seed.

    Methods are compared with the best of those without an LLM, which is the strongest control.
    """
    budget = min(r["budget"] for r in results)
    steps = sorted({math.ceil(budget * share) for share in SHARES_OF_BUDGET})
    by_method: dict[str, BySeed] = {}
    for r in results:
        by_method.setdefault(r["method"], {})[r["seed"]] = r
    control = _control(by_method, without_llm, budget)
    compared = (steps[len(steps) // 2 - 1], budget) if control else ()
    table = Table(title=f"β = {rate:g}: the best so far ÷ uniform, after a number of evaluations")
    table.add_column("method", no_wrap=True)
    for column in (*map(str, steps), "report text", *(f"better than\n{control} after {step}" for step in compared)):
        table.add_column(column, justify="right")
    for method, rows in by_method.items():
        others = {} if method == control or control is None else by_method[control]
        table.add_row(
            LABELS.get(method, method),
            *(_median((_after(r, step) for r in rows.values()), 3) for step in steps),
            _median((r["report"] / r["uniform_report"] for r in rows.values()), 3),
            *(_paired(rows, others, step) for step in compared),
        )
    Console(width=190).print(table)


def _control(by_method: Mapping[str, BySeed], without_llm: Collection[str], budget: int) -> str | None:
    """Return the method without an LLM that has the lowest median in the end; None if there is none."""
    ends = {
        method: statistics.median(_after(r, budget) for r in rows.values())
        for method, rows in by_method.items()
        if method in without_llm
    }
    return min(ends, key=lambda method: ends[method], default=None)


def _after(result: dict[str, Any], evaluations: int) -> float:
    """Return the best fitness after this number of evaluations, as a share of uniform's; infinity if there is none."""
    so_far = result["best_so_far"]
    steps = zip(so_far["evaluations"], so_far["fitness"], strict=True)
    return min((fitness for n, fitness in steps if n <= evaluations), default=math.inf) / float(result["uniform"])


def _paired(rows: BySeed, others: BySeed, step: int) -> str:
    """Return on how many of the common seeds `rows` are better, and p of a two-sided sign-flip test."""
    pairs = [(_after(rows[seed], step), _after(others[seed], step)) for seed in sorted(rows.keys() & others.keys())]
    gains = [math.log(theirs / ours) for ours, theirs in pairs if math.isfinite(ours + theirs)]
    if not gains:
        return ""
    return f"{sum(gain > 0 for gain in gains)} of {len(gains)}, p {sign_flip_p(gains):.2f}"


def sign_flip_p(gains: Sequence[float]) -> float:
    """Return the share of all sign flips of `gains` whose sum is at least as far from zero: a permutation test."""
    found = abs(sum(gains)) * (1 - 1e-9)
    flips = product((1, -1), repeat=len(gains))
    extreme = sum(abs(sum(s * g for s, g in zip(signs, gains, strict=True))) >= found for signs in flips)
    return extreme / float(2 ** len(gains))
