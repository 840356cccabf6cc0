"""Perplexity and size of each GGUF type, for SmolLM2-135M-Instruct pruned uniformly.

    python -m benchmarks.micro.gguf_types TEXT --calibration TEXT [--rate 0.3] [--multiple-of 32 256] [--json FILE]

Perplexity is measured in llama.cpp: its server returns the final hidden states of each window, with the KV cache in
F32, and the benchmark multiplies them with the file's own head. The first row of each table is transformers in float32.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import gguf

from gpu_worker.evaluation.allocation import prepare
from gpu_worker.evaluation.target import Target
from gpu_worker.llama_cpp.client import gguf_perplexity
from gpu_worker.llama_cpp.writer import write_gguf
from gpu_worker.measuring.perplexity import perplexity
from protocol.plans.allocation import Allocation, PruningRequest
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.results.formats import GgufType

WINDOWS, SEQLEN, CALIBRATION_WINDOWS = 4, 512, 16


def pruned(text: str, calibration: str, rate: float, multiple_of: int) -> tuple[Target, Any]:
    """Return the pruned model and its plan."""
    spec = SearchSpec(
        model="smollm2",
        rate=rate,
        split="mlp-first",
        multiple_of=multiple_of,
        calibration=TextSpec(source=calibration, windows=CALIBRATION_WINDOWS, seqlen=SEQLEN),
        fitness=TextSpec(source=text, windows=WINDOWS, seqlen=SEQLEN),
        dtype="float32",
    )
    target = prepare(PruningRequest(spec, Allocation(method="uniform")))
    plan = spec.plan([rate] * len(target.shape.layers), target.shape)
    target.prune(plan)
    return target, plan


def measure(target: Target, plan: Any, types: Sequence[GgufType]) -> list[dict[str, Any]]:
    """Return a row for each type: file size in bytes, perplexity, and the number of tensors of each kind."""
    windows = target.texts.fitness
    rows: list[dict[str, Any]] = [{"type": "float32", "perplexity": perplexity(target.model.decoder, windows)[0]}]
    for file_type in types:
        with tempfile.TemporaryDirectory() as folder:
            path = write_gguf(target.model, plan, Path(folder), file_type=file_type, name="pruned")
            kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors]
            rows.append(
                {
                    "type": file_type,
                    "perplexity": gguf_perplexity(path, windows),
                    "bytes": path.stat().st_size,
                    "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds) - {"F32"})},
                }
            )
        print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.get("kinds", {}).items())
    size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""
    return f"| {row['type']} | {row['perplexity']:.2f} | {size} | {kinds} |"


def main() -> None:
    """Print a table for each value of --multiple-of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--multiple-of", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--types", nargs="+", default=list(get_args(GgufType)), choices=get_args(GgufType))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for multiple in options.multiple_of:
        target, plan = pruned(options.text, options.calibration, options.rate, multiple)
        print(f"\nMLP widths multiples of {multiple}\n\n| type | perplexity | MB | matrices |")
        print("| --- | --- | --- | --- |", flush=True)
        found[multiple] = measure(target, plan, options.types)
        print(_line(found[multiple][0]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
