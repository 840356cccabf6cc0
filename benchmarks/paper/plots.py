"""Plots of perplexity and accuracy against the pruning rate, one for each column of Tables 1 and 2."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.paper.cells import Outcome
from benchmarks.paper.tables import Row, TableLayout, fill_table

NAMES = {1: "perplexity", 2: "accuracy"}
Curve = list[tuple[float, float]]
"""Points: rate in percent, and figure."""


def plot(tables: Sequence[TableLayout], outcomes: Mapping[str, Outcome], folder: Path) -> list[Path]:
    """Plot each column that has a figure: ours as solid lines, the paper's dashed. Returns the written files."""
    written = []
    for table in tables:
        rows = fill_table(table, outcomes) if table.number in NAMES else []
        for number, column in enumerate(table.columns):
            curves = curves_of(rows, number)
            if any(ours for ours, _ in curves.values()):
                file = folder / f"{NAMES[table.number]}-{re.sub(r'[^A-Za-z0-9.]+', '-', column)}.png"
                _draw(curves, f"{table.title}: {column}", file, logarithmic=table.number == 1)
                written.append(file)
    return written


def curves_of(rows: Sequence[Row], column: int) -> dict[str, tuple[Curve, Curve]]:
    """Return our curve and the paper's for each method. All of them start at the figure of the dense model."""
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
    temporary = file.with_name(f".{os.getpid()}-{file.name}")  # another process may write the file too
    figure.savefig(temporary, dpi=110)
    temporary.replace(file)
    plt.close(figure)
