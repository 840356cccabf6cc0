"""Perplexity and accuracy against the rate, a plot for each column of Tables 1 and 2."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.paper.cells import Outcome
from benchmarks.paper.tables import Row, WantedTable, filled

NAMES = {1: "perplexity", 2: "accuracy"}
Curve = list[tuple[float, float]]
"""Rates in percent, and figures."""


def plot(tables: Sequence[WantedTable], outcomes: Mapping[str, Outcome], folder: Path) -> list[Path]:
    """Write the plots of those columns that have a figure; ours are whole lines, the paper's are dashed."""
    written = []
    for table in tables:
        rows = filled(table, outcomes) if table.number in NAMES else []
        for number, column in enumerate(table.columns):
            curves = curves_of(rows, number)
            if any(ours for ours, _ in curves.values()):
                file = folder / f"{NAMES[table.number]}-{re.sub(r'[^A-Za-z0-9.]+', '-', column)}.png"
                _draw(curves, f"{table.title}: {column}", file, logarithmic=table.number == 1)
                written.append(file)
    return written


def curves_of(rows: Sequence[Row], column: int) -> dict[str, tuple[Curve, Curve]]:
    """By method: our curve and the paper's. Dense, which has one figure, is the beginning of all of them."""
    curves: dict[str, tuple[Curve, Curve]] = {}
    for row in rows:
        rate, method = row.labels
        entry = row.entries[column]
        ours, paper = curves.setdefault(method, ([], []))
        for curve, figure in ((ours, entry.ours), (paper, entry.paper)):
            if figure is not None:
                curve.append((float(rate.rstrip("%")), figure))
    dense = curves.pop("Dense", ([], []))
    for found in curves.values():
        for curve, start in zip(found, dense, strict=True):
            curve[:0] = start if curve else []
    return curves


def _draw(curves: Mapping[str, tuple[Curve, Curve]], title: str, file: Path, *, logarithmic: bool) -> None:
    figure, ax = plt.subplots(figsize=(7, 5))
    for number, (method, (ours, paper)) in enumerate(curves.items()):
        for curve, line, label in ((ours, "-", method), (paper, "--", f"{method} (paper)")):
            if curve:
                rates, figures = zip(*curve, strict=True)
                ax.plot(rates, figures, line, marker="o", markersize=4, color=f"C{number}", label=label)
    if logarithmic:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:,.4g}")
        ax.yaxis.set_minor_formatter("{x:,.3g}")
    ax.set_xlabel("pruning rate, %")
    ax.set_title(title)
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)
    figure.tight_layout()
    beside = file.with_name(f".{os.getpid()}-{file.name}")  # another call may write it too
    figure.savefig(beside, dpi=110)
    beside.replace(file)
    plt.close(figure)
