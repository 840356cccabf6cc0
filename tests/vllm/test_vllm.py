"""An export of SmolLM2 in the real vLLM, on the CPU: the same tokens as in transformers, served over HTTP, and timed.

`make test-vllm` makes the environment, because vLLM pins versions of its own.
"""

import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import selfpruner
from protocol.results.speeds import SpeedResult
from tests.support.compose import free_port

pytestmark = pytest.mark.vllm
PROMPTS = ("The capital of France is", "Water boils at a temperature of", "In the early morning, the")
TOKENS = 16
READY_SECONDS = 300.0


def ran(*arguments: object) -> str:
    command = [sys.executable, "-m", "daemon", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    generator = random.Random(0)
    words = ("river", "house", "green", "over", "it", "was", "many", "people", "garden", "while", "rain", "fell")
    (folder / "text.txt").write_text(" ".join(generator.choices(words, k=20_000)))
    text = folder / "text.txt"
    ran(
        *("export", "--model", "smollm2", "--allocate", "first-layer", "--rate", 0.2, "--out", folder / "small"),
        *("--data", text, "--calibration-data", text, "--windows", 2, "--seqlen", 128, "--calibration-windows", 8),
        *("--reconstruction", "least-squares", "--granularity", "block", "--dtype", "float32"),
    )
    return folder / "small"


@pytest.fixture(scope="module")
def expected(exported: Path) -> list[list[int]]:
    """What transformers generates greedily, without the prompts."""
    model, tokenizer = selfpruner.load(exported, dtype="float32")
    found = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            whole = model.generate(tokens, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        found.append(whole[0, tokens.shape[1] :].tolist())
    return found


def test_vllm_generates_what_transformers_generates(exported: Path, expected: list[list[int]]) -> None:
    program = f"""
import json
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM({str(exported)!r}, trust_remote_code=True, model_impl="transformers", dtype="float32",
              enforce_eager=True, max_model_len=128, max_num_seqs=4)
    sampling = SamplingParams(temperature=0.0, max_tokens={TOKENS}, min_tokens={TOKENS}, ignore_eos=True)
    found = llm.generate({list(PROMPTS)!r}, sampling, use_tqdm=False)
    print("FOUND", json.dumps([list(each.outputs[0].token_ids) for each in found]))
"""
    file = exported.parent / "generate.py"
    file.write_text(program)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, file], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    assert json.loads(line.removeprefix("FOUND ")) == expected


@pytest.fixture
def served(exported: Path) -> Iterator[str]:
    """What `vllm serve` runs, with the export and the flags of its model card, and its URL.

    The command `vllm` itself asks for the version of a package `vllm`, and the one for CPUs is called vllm-cpu.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(exported)]
    command += ["--trust-remote-code"]
    command += ["--model-impl", "transformers", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (exported.parent / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + READY_SECONDS
        while time.monotonic() < end and process.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            raise AssertionError((exported.parent / "serve.log").read_text()[-3000:])
        yield url
    finally:
        process.terminate()
        process.wait(60)


def test_vllm_serves_the_export_over_http(served: str, exported: Path, expected: list[list[int]]) -> None:
    _, tokenizer = selfpruner.load(exported, dtype="float32")
    asked = {"model": "small", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{served}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected[0])


def test_its_speed_is_measured_beside_the_dense_model(exported: Path) -> None:
    """Its answer is all that the command prints to stdout, whatever vLLM and its processes print."""
    answer = ran(
        *("speed", exported, "--baseline", "smollm2", "--engine", "vllm", "--dtype", "float32", "--json"),
        *("--batch-size", 8, "--prompt", 128, "--generate", 32, "--repeats", 3),
    )
    (engine,) = SpeedResult.model_validate_json(answer).engines
    (batch,) = engine.batches
    sys.stdout.write(f"speed-up in prefill {batch.prefill.speed_up}, in decode {batch.decode.speed_up}\n")
    assert engine.engine == "vllm" and batch.decode.speed_up.median > 0
