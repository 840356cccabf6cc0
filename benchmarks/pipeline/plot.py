"""Draws how busy the workers are."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the busy share over the time of an answer, a panel for each time of an evaluation; write `file`."""
    times = sorted({row["evaluation"] for row in rows})
    figure, panels = plt.subplots(1, len(times), figsize=(10, 4), sharey=True, layout="constrained", squeeze=False)
    for axes, evaluation in zip(panels[0], times, strict=True):
        here = [row for row in rows if row["evaluation"] == evaluation]
        for i, workers in enumerate(sorted({row["workers"] for row in here})):
            for mode, style in (("generational", "--"), ("steady-state", "-")):
                line = [row for row in here if (row["workers"], row["mode"]) == (workers, mode)]
                label = f"{workers} workers, {mode}"
                axes.plot([r["answer"] for r in line], [r["busy"] for r in line], style, color=f"C{i}", label=label)
        axes.set_xscale("log")
        axes.set_xlabel("seconds of an answer")
        axes.set_title(f"evaluations of {evaluation:g} s", loc="left", fontsize="medium")
        axes.legend(fontsize="x-small")
    panels[0][0].set_ylim(0, 1)
    panels[0][0].set_ylabel("share of time in which workers measure")
    figure.savefig(file, dpi=120)
    plt.close(figure)
