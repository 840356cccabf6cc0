"""`python -m benchmarks.search.plot_quality`: draw docs/images/quality.svg from docs/results/quality.md."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[2] / "docs"
RATES = (0.2, 0.3, 0.4, 0.5)
DENSE = 28.98
DRAWN = {
    "uniform, any heads": ("C3", ":"),
    "uniform, fitted": ("C0", "--"),
    "LLM search": ("C2", "-"),
}


def read_table(text: str) -> dict[str, list[float]]:
    """Return the rows of the section "Four rates" in which every rate has a perplexity."""
    section = text.partition("## Four rates")[2].partition("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        try:
            rows[name] = [float(cell) for cell in cells]
        except ValueError:
            continue
    return {name: values for name, values in rows.items() if len(values) == len(RATES)}


def draw(rows: dict[str, list[float]], file: Path) -> None:
    """Draw perplexity against the share removed, on a logarithmic axis."""
    plt.rcParams["svg.hashsalt"] = "self-pruner"  # the same file for the same figures
    figure, ax = plt.subplots(figsize=(7, 3.6))
    for name, (color, style) in DRAWN.items():
        ax.plot(RATES, rows[name], color=color, linestyle=style, marker="o", label=name)
    ax.axhline(DENSE, color="grey", linewidth=1, label="dense")
    ax.set_yscale("log")
    ticks = (30, 50, 100, 200, 500)
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_xticks(RATES, [f"{rate:.0%}" for rate in RATES])
    ax.set_xlabel("decoder parameters removed")
    ax.set_ylabel("perplexity (log scale)")
    ax.set_title("SmolLM2-135M, WikiText-2 test, 32 × 512 tokens, one seed", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(read_table((DOCS / "results" / "quality.md").read_text()), DOCS / "images" / "quality.svg")
