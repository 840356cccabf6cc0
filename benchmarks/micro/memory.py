"""Peak memory of a pruned and a dense evaluation, each in its own process, and the time of exports.

    python -m benchmarks.micro.memory [--json FILE]

SmolLM2-135M-Instruct in bfloat16 on random tokens. The peak is that of the resident set, minus the memory of torch and
transformers before a model is loaded.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.export.facts import ExportFacts
from gpu_worker.export.writer import ExportContent, export_model
from gpu_worker.measuring.half_precision import products_in_float32
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.pruning.calibration import calibrate
from gpu_worker.pruning.importance import wanda_sp
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import Plan, make_plan
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.results.formats import Destination, Format

TEXT = TextSpec(source="self", windows=4, seqlen=1024)
SPEC = SearchSpec(model="smollm2", rate=0.3, calibration=TEXT, fitness=TEXT)
FORMATS: tuple[Format, ...] = ("hf", "padded", "gguf")


def peak() -> int:
    """Return the peak resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tokens() -> Tensor:
    """Return windows of random tokens."""
    return torch.randint(1000, 40_000, (4, 1024), generator=torch.Generator().manual_seed(0))


def evaluate_dense() -> dict[str, float]:
    """Return the peak memory of loading the dense model and measuring its perplexity, in bytes."""
    before = peak()
    perplexity(load_model("smollm2", "bfloat16").decoder, tokens())
    return {"peak": peak() - before}


def evaluate_pruned() -> dict[str, float]:
    """Return the peak memory, in bytes, of loading, calibrating, ordering, pruning and measuring.

    The plan has two rates, and with one of them query heads are gathered. Also returns the parameters of the decoder.
    """
    before = peak()
    model, plan = pruned()
    perplexity(model.decoder, tokens())
    return {"peak": peak() - before, "decoder": plan.decoder_parameters(model.decoder.shape)}


def export_all() -> dict[str, float]:
    """Return the seconds of writing each format."""
    model, plan = pruned()
    facts = ExportFacts(
        base_model="smollm2",
        method="uniform",
        rates=(0.3,) * 30,
        spec=SPEC,
        text_numbers=SPEC.text_numbers,
        shape=model.decoder.shape,
        plan=plan,
    )
    folder = Path(tempfile.mkdtemp(prefix="export-"))
    seconds: dict[str, float] = {}
    try:
        for format_ in FORMATS:
            start = time.perf_counter()
            export_model(ExportContent(model, facts), Destination(folder / format_, (format_,)))
            seconds[format_] = time.perf_counter() - start
    finally:
        shutil.rmtree(folder)
    return seconds


def pruned() -> tuple[LoadedModel, Plan]:
    """Return SmolLM2 pruned by 30 %, scored on random tokens."""
    model = load_model("smollm2", "bfloat16")
    decoder = model.decoder
    seen = calibrate(decoder, tokens())
    scores = [wanda_sp(*each) for each in zip(decoder.layers, seen, decoder.shape.layers, strict=True)]
    plan = make_plan([0.4] * 15 + [0.2] * 15, decoder.shape)
    OrderedModel(decoder, scores).apply(plan)
    return model, plan


STEPS = {"dense": evaluate_dense, "pruned": evaluate_pruned, "export": export_all}


@products_in_float32()
def main() -> None:
    """Run each step in its own process and print the table."""
    arguments = argparse.ArgumentParser(description="Peak memory, and the time of exports.")
    arguments.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.step:
        print(json.dumps(STEPS[given.step]()))
        return
    found = {step: _in_a_process(step) for step in STEPS}
    figures = {
        "dense peak, MB": found["dense"]["peak"] / 1e6,
        "pruned peak, MB": found["pruned"]["peak"] / 1e6,
        "pruned / dense": found["pruned"]["peak"] / found["dense"]["peak"],
        **{f"export {name}, seconds": value for name, value in found["export"].items()},
    }
    for name, value in figures.items():
        print(f"{name:24} {value:10.3f}")
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


def _in_a_process(step: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.micro.memory", "--step", step]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(answer.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
