"""Run all that needs a GPU, and write one report: tests, speeds, and a search of ten candidates.

    python -m benchmarks.gpu [--out runs/gpu] [--layers N]

Models have random weights, so nothing is downloaded. On an H100 it takes about half an hour. Without a GPU, it says so
and does nothing.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer

from benchmarks.worker_throughput.random_models import random_model
from gpu_worker.models.gguf_files import unpacked
from protocol.runtime.paths import smollm2_file

SHAPE = "llama-2-7b"
LARGE, LARGE_LAYERS = "llama-3-70b", 4


def main() -> int:
    """Run each step as a process of its own, and write what it printed. Return 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--layers", type=int, help=f"decoder layers of the {SHAPE} (default: all)")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU: nothing to run")
        return 0
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    layers = ["--layers", str(given.layers)] if given.layers else []
    search = _search(out, given.layers, torch.device("cuda"))
    speed = [python, "-m", "benchmarks.worker_throughput"]
    steps = {
        "Tests that need a GPU": [python, "-m", "pytest", "tests/gpu", "-m", "gpu", "-rA"],
        f"Speed of a {SHAPE}": [
            *speed, "--shape", SHAPE, *layers, "--windows", "8", "--seqlen", "2048",
            "--json", str(out / "throughput-7b.json"), "--plot", str(out / "throughput-7b.png"),
        ],
        f"Speed of {LARGE_LAYERS} layers of a {LARGE}": [
            *speed, "--shape", LARGE, "--layers", str(LARGE_LAYERS), "--windows", "8", "--seqlen", "2048",
            "--json", str(out / "throughput-70b.json"),
        ],
        "A search of ten candidates": [python, "-m", "daemon", "run", str(search)],
    }  # fmt: skip
    cards = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    report = [f"# {cards}", f"torch {torch.__version__}, CUDA {torch.version.cuda}"]
    failed = False
    for title, command in steps.items():
        print(f"{title} …", flush=True)
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        failed |= done.returncode != 0
        said = done.stdout + (done.stderr[-4000:] if done.returncode else "")
        verdict = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        report.append(f"## {title}: {verdict} in {time.perf_counter() - start:.0f} s\n\n```text\n{said.strip()}\n```")
        (out / "report.md").write_text("\n\n".join(report) + "\n")
    print(f"the report is in {out / 'report.md'}")
    return int(failed)


def _search(out: Path, layers: int | None, device: torch.device) -> Path:
    """Write a model with random weights and the settings of a search for it; return the settings."""
    shutil.rmtree(out / "searches", ignore_errors=True)
    folder = out / f"model-{layers or 'whole'}"
    if not folder.exists():
        unfinished = out / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer = AutoTokenizer.from_pretrained(unpacked(smollm2_file(), "bfloat16"))
        tokenizer.save_pretrained(unfinished)
        model = random_model(SHAPE, layers, torch.bfloat16, device, vocab_size=len(tokenizer))
        model.causal_lm.save_pretrained(unfinished)
        unfinished.rename(folder)
        del model
        torch.cuda.empty_cache()
    windows = {"calibration_windows": 16, "fitness_windows": 8, "seqlen": 1024}
    settings = {
        "search": {"name": "gpu", "proposer": "evolution", "population": 4, "max_evaluations": 10, "fitness": "kl",
                   "granularity": "block", "reconstruction": "least-squares", "seeds": ["rule"]},
        "target": {"model": str(folder), "rate": 0.3},
        "data": {"calibration": "self", "fitness": "self", **windows},
        "run": {"folder": str(out / "searches")},
    }  # fmt: skip
    file = out / "search.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


if __name__ == "__main__":
    sys.exit(main())
