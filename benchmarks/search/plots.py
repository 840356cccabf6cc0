"""The plots of benchmarks/search/compare_search.py."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter


def plot_convergence(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot the best so far against evaluations and against tokens: median and range over seeds.

    Every seed has its own windows, so fitness is divided by that of uniform rates with the same reconstruction.
    """
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    methods = list(dict.fromkeys(r["method"] for r in results))
    for number, method in enumerate(methods):
        rows = [r for r in results if r["method"] == method]
        for ax, by in zip(axes, ("evaluations", "tokens"), strict=True):
            _band(ax, rows, by, method, f"C{number}")
    for ax, by in zip(axes, ("evaluations", "tokens measured on"), strict=True):
        ax.axhline(1, color="grey", linestyle=":", label="uniform, with the same reconstruction")
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.set_xlabel(by)
        ax.grid(alpha=0.3)
    axes[1].xaxis.set_major_formatter("{x:,.0f}")
    axes[0].set_ylabel("best so far, as a share of uniform's")
    axes[1].legend()
    seeds = len({r["seed"] for r in results})
    figure.suptitle(f"β = {results[0]['rate']:g}, {seeds} seed{'s' if seeds > 1 else ''}: median and range")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _band(ax: Axes, rows: Sequence[dict[str, Any]], by: str, label: str, colour: str) -> None:
    last = max(r["budget"] if by == "evaluations" else r["tokens"] for r in rows)
    first = max(r["best_so_far"][by][0] for r in rows)
    positions = [first + (last - first) * i / 200 for i in range(201)]
    curves = [[_at(r["best_so_far"], by, position) / r["uniform"] for position in positions] for r in rows]
    columns = list(zip(*curves, strict=True))
    ax.step(positions, [statistics.median(c) for c in columns], where="post", color=colour, label=label)
    if len(rows) > 1:
        ax.fill_between(
            positions, [min(c) for c in columns], [max(c) for c in columns], step="post", color=colour, alpha=0.15
        )


def _at(so_far: dict[str, Any], by: str, position: float) -> float:
    found: list[float] = [p for at, p in zip(so_far[by], so_far["fitness"], strict=True) if at <= position]
    return found[-1]


def plot_rates(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot the rates of each method's best search as a heat map: one row per method, one column per unit."""
    best: dict[str, dict[str, Any]] = {}
    for r in results:
        if r["method"] not in best or r["report"] < best[r["method"]]["report"]:
            best[r["method"]] = r
    by_block = results[0]["granularity"] == "block"
    parts = (("attention", 0, 2), ("MLP", 1, 2)) if by_block else (("layer", 0, 1),)
    size = (12, 1.5 + 0.4 * len(best) * len(parts))
    figure, axes = plt.subplots(len(parts), 1, figsize=size, squeeze=False, layout="constrained")
    for ax, (kind, start, step) in zip(axes[:, 0], parts, strict=True):
        image = ax.imshow(
            [r["rates"][start::step] for r in best.values()], aspect="auto", vmin=0, vmax=1, cmap="viridis"
        )
        ax.set_yticks(range(len(best)), list(best))
        ax.set_title(f"pruning rate of each {kind} block" if by_block else "pruning rate of each layer")
    figure.colorbar(image, ax=axes, aspect=10)
    axes[-1, 0].set_xlabel("decoder layer")
    figure.savefig(file, dpi=110)
    plt.close(figure)
