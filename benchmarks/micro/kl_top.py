"""Compares the divergence over the top k tokens with that over the whole vocabulary, in value and in rank.

    python -m benchmarks.micro.kl_top TEXT [--plans 12] [--json FILE]

SmolLM2-135M-Instruct is pruned by random plans at β = 0.3. For perplexity and for each k, the table shows the rank
correlation with the divergence over the whole vocabulary, the mean ratio to it, and the seconds of one evaluation.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.measuring.divergence import DensePredictions, dense_predictions, divergence
from gpu_worker.measuring.half_precision import products_in_float32
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.limits import KL_TOP_K
from gpu_worker.models.loading import load_model
from gpu_worker.pruning.calibration import calibrate
from gpu_worker.pruning.importance import wanda_sp
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import Plan, feasible_rates, make_plan
from protocol.plans.shape import ModelShape

RATE, CALIBRATION_WINDOWS, WINDOWS, SEQLEN = 0.3, 2, 2, 512
KEPT = (32, 128, KL_TOP_K, 2048)
WHOLE = "whole vocabulary"
Figure = tuple[float, float]
"""A value, and the seconds it took."""


def random_plan(rng: random.Random, shape: ModelShape) -> Plan:
    """Return a plan with random rates between zero and twice the rate."""
    rates = [rng.uniform(0, 2 * RATE) for _ in shape.layers]
    return make_plan(feasible_rates(rates, shape, RATE, granularity="layer"), shape)


def figures_of(ordered: OrderedModel, windows: Tensor, kept: dict[str, DensePredictions]) -> dict[str, Figure]:
    """Return the perplexity of the pruned model, and its divergence for each k."""
    start = time.perf_counter()
    figures = {"perplexity": (perplexity(ordered.decoder, windows)[0], time.perf_counter() - start)}
    for name, dense in kept.items():
        start = time.perf_counter()
        figures[name] = (divergence(ordered.decoder, windows, dense).kl, time.perf_counter() - start)
    return figures


def ranks(values: Sequence[float]) -> list[int]:
    """Return the rank of each value."""
    order = sorted(values)
    return [order.index(value) for value in values]


def ready(text: str) -> tuple[OrderedModel, Tensor]:
    """Return the model, scored on the beginning of `text`, and the following windows to measure on."""
    model = load_model("smollm2", "bfloat16")
    decoder = model.decoder
    tokens = torch.tensor(model.tokenizer(text, verbose=False)["input_ids"])
    windows = tokens[: (CALIBRATION_WINDOWS + WINDOWS) * SEQLEN].view(-1, SEQLEN)
    seen = calibrate(decoder, windows[:CALIBRATION_WINDOWS])
    scores = [wanda_sp(*each) for each in zip(decoder.layers, seen, decoder.shape.layers, strict=True)]
    return OrderedModel(decoder, scores), windows[CALIBRATION_WINDOWS:]


def compared(rows: Sequence[dict[str, Figure]]) -> dict[str, dict[str, float]]:
    """Compare each figure of the plans (one row per plan) with the divergence over the whole vocabulary."""
    whole = [row[WHOLE][0] for row in rows]
    table = {}
    for name in rows[0]:
        values = [row[name][0] for row in rows]
        table[name] = {
            "seconds": statistics.median(row[name][1] for row in rows),
            "rank correlation": statistics.correlation(ranks(values), ranks(whole)),
        }
        if name != "perplexity":
            table[name]["share"] = statistics.mean(value / of for value, of in zip(values, whole, strict=True))
    return table


@products_in_float32()
def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="The divergence over the top k tokens against the whole vocabulary's.")
    parser.add_argument("text", type=Path)
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    ordered, windows = ready(options.text.read_text(encoding="utf-8"))
    sizes = {**{f"top {k}": k for k in KEPT}, WHOLE: ordered.decoder.head.out_features}
    kept = {name: dense_predictions(ordered.decoder, windows, top=k)[0] for name, k in sizes.items()}
    rng, rows = random.Random(0), []
    for _ in range(options.plans):
        ordered.apply(random_plan(rng, ordered.decoder.shape))
        rows.append(figures_of(ordered, windows, kept))
    table = compared(rows)
    for name, figures in table.items():
        print(f"{name:18}" + "".join(f"  {title} {value:8.4f}" for title, value in figures.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
