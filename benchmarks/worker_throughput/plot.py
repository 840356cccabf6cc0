"""Draws where the time of a candidate goes."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def plot(found: dict[str, Any], file: Path) -> None:
    """Draw one bar for each row of `found`, split into stages, with its products alone as a mark; write `file`."""
    rows = found["rows"]
    names = [f"{row['fitness']}, {row['reconstruction']}, {row['rate']:.0%}" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.2), layout="constrained")
    left = [0.0] * len(rows)
    for kind in rows[0]["stages"]:
        widths = [row["stages"][kind] * row["seconds"] for row in rows]
        axes.barh(names, widths, left=left, label=kind)
        left = [done + width for done, width in zip(left, widths, strict=True)]
    axes.plot([row["products"] for row in rows], names, "k|", markersize=16, label="products alone")
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds per candidate of {found['windows']} × {found['seqlen']} tokens")
    axes.set_title(f"{found['model']}, {found['device']}", loc="left", fontsize="medium")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)
