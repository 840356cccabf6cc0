"""Time of a window's loss and gradients in half precision on this CPU, computed by torch and by us.

    python -m benchmarks.micro.half_precision [--model smollm2] [--seqlen 512] [--json FILE]

On CPUs without bfloat16 instructions, measuring/half_precision.py computes the products; on others both columns are the
same. The three variants run in turn, and the minimum time of each counts, to reduce the effect of other processes.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_worker.measuring.half_precision import is_slow, products_in_float32
from gpu_worker.measuring.perplexity import window_loss
from gpu_worker.models.loading import LoadedModel, load_model


def loss(model: LoadedModel, window: Tensor) -> None:
    """Compute the loss of `window` [1, seqlen], as for perplexity."""
    with torch.inference_mode():
        window_loss(model.decoder, window)


def gradients(model: LoadedModel, window: Tensor) -> None:
    """Compute the gradients of all weights for the mean loss of `window` [1, seqlen]."""
    model.causal_lm.requires_grad_(True)
    model.causal_lm(input_ids=window, labels=window, use_cache=False).loss.backward()
    model.causal_lm.requires_grad_(False).zero_grad()


def seconds(work: Callable[[LoadedModel, Tensor], None], model: LoadedModel, window: Tensor) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work(model, window)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    half, full = (load_model(options.model, dtype) for dtype in ("bfloat16", "float32"))
    window = torch.randint(1000, half.decoder.head.out_features, (1, options.seqlen))
    ways: dict[str, tuple[LoadedModel, Callable[[], AbstractContextManager[None]]]] = {
        "bfloat16 in torch": (half, nullcontext),
        "bfloat16 here": (half, products_in_float32),
        "float32": (full, nullcontext),
    }
    told: dict[str, Any] = {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "instructions for bfloat16": not is_slow(torch.bfloat16),
    }
    print(", ".join(f"{name}: {value}" for name, value in told.items()))
    print(
        "| a window, seconds | " + " | ".join(ways) + " | torch / here |\n| --- | " + "---: | " * len(ways) + "---: |"
    )
    for work in (loss, gradients):
        least = dict.fromkeys(ways, float("inf"))
        for _ in range(options.repeats):
            for name, (model, computing) in ways.items():
                with computing():
                    least[name] = min(least[name], seconds(work, model, window))
        ratio = least["bfloat16 in torch"] / least["bfloat16 here"]
        figures = " | ".join(f"{value:.2f}" for value in least.values())
        print(f"| {work.__name__} | {figures} | {ratio:.1f} |", flush=True)
        told[work.__name__] = least
    if options.json:
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
