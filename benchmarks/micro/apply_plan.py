"""The cost of pruning relative to measuring: applying a plan, and calibrating, against the forward passes.

    python -m benchmarks.micro.apply_plan [--json FILE]

SmolLM2-135M-Instruct on random tokens; medians of a few runs, in seconds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.measuring.half_precision import products_in_float32
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.families import Decoder
from gpu_worker.models.loading import load_model
from gpu_worker.pruning.calibration import calibrate
from gpu_worker.pruning.importance import wanda_sp
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import Plan, make_plan

WINDOWS, SEQLEN = 4, 512


def seconds(work: Callable[[], object], runs: int = 5) -> float:
    """Return the median wall time of `work`, after one warm-up run."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def forward(decoder: Decoder, windows: Tensor) -> None:
    """Run the plain forward pass that calibration is compared with: window by window, no logits."""
    with torch.inference_mode():
        for window in windows:
            decoder.body(input_ids=window[None].to(decoder.head.weight.device), use_cache=False)


@products_in_float32()
def main() -> None:
    """Measure and print the table."""
    arguments = argparse.ArgumentParser(description="What applying a plan and calibrating cost.")
    arguments.add_argument("--json", type=Path, help="write the figures to this file too")
    file: Path | None = arguments.parse_args().json
    decoder = load_model("smollm2", "bfloat16").decoder
    windows = torch.randint(1000, 40_000, (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(0))
    plain = seconds(lambda: forward(decoder, windows))
    figures = {"forward": plain, "calibrate": seconds(lambda: calibrate(decoder, windows))}
    figures["calibrate / forward"] = figures["calibrate"] / plain

    seen = calibrate(decoder, windows)
    scores = [wanda_sp(*each) for each in zip(decoder.layers, seen, decoder.shape.layers, strict=True)]
    ordered = OrderedModel(decoder, scores)
    uniform = make_plan([0.3] * len(decoder.layers), decoder.shape)
    plans = {"views": uniform, "with a gather": gathering(uniform)}
    for name, plan in plans.items():
        figures[f"apply, {name}"] = seconds(lambda plan=plan: ordered.apply(plan), runs=20)  # type: ignore[misc]
        figures[f"evaluate, {name}"] = seconds(lambda: perplexity(decoder, windows))
        figures[f"apply / evaluate, {name}"] = figures[f"apply, {name}"] / figures[f"evaluate, {name}"]

    for name, value in figures.items():
        print(f"{name:32} {value:10.5f}")
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def gathering(plan: Plan) -> Plan:
    """Return `plan` with two query heads per KV head in every layer, for which query rows must be gathered."""
    return Plan(layers=tuple(layer.model_copy(update={"queries_per_kv": 2}) for layer in plan.layers))


if __name__ == "__main__":
    main()
