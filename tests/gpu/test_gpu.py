"""What only a GPU can show: equal figures, nothing that waits, kernels that keep little, recovery from failures.

`make gpu` runs these.
"""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch

from gpu_worker.evaluation.outcomes import answer
from gpu_worker.evaluation.session import Session
from gpu_worker.evaluation.target import Target
from gpu_worker.measuring.perplexity import final_hidden, window_loss
from gpu_worker.models.attention import causal_attention
from gpu_worker.models.families import FAMILIES, extract_decoder
from gpu_worker.models.loading import LoadedModel
from protocol.plans.candidate import Measured
from protocol.plans.spec import SearchSpec
from tests.support.tiny_models import byte_tokenizer, tiny_causal_lm, tiny_windows
from tests.support.tiny_specs import tiny_spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
GPU = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Multiply float32 exactly, so that figures can be compared with those of a CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another name for this
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        yield
        torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(family: str, device: torch.device = GPU) -> LoadedModel:
    model = tiny_causal_lm(family, channels=200).to(device)
    return LoadedModel(model, byte_tokenizer(), extract_decoder(model), identity=f"tiny-{family}")


def session_of(spec: SearchSpec, model: LoadedModel) -> Session:
    target = Target(spec, model=model, share_text=lambda windows, length, _: tiny_windows(windows, length))
    return Session(spec, sensitivity=False, target=target)


@pytest.fixture
def spec(tmp_path: Path) -> SearchSpec:
    made = tiny_spec(tmp_path)
    text = made.fitness.model_copy(update={"source": "self"})
    chosen = {"calibration": text, "fitness": text, "report": None, "measure": "kl", "granularity": "block"}
    return made.model_copy(update=chosen | {"reconstruction": "least-squares"})


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_gpu_measures_what_a_cpu_does(family: str, spec: SearchSpec) -> None:
    found = []
    for device in (torch.device("cpu"), GPU):
        session = session_of(spec, on_gpu(family, device))
        found.append(session.evaluate(spec.uniform_plan(session.shape)))
    assert found[1].perplexity == pytest.approx(found[0].perplexity, rel=1e-3)
    assert found[1].kl == pytest.approx(found[0].kl, rel=1e-2)


def test_a_fit_in_main_memory_takes_less_of_the_gpu_and_measures_the_same(spec: SearchSpec) -> None:
    found, taken = [], []
    for in_main_memory in (False, True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        session = session_of(spec, replace(on_gpu("llama"), fit_in_main_memory=in_main_memory))
        taken.append(torch.cuda.memory_allocated() - before)
        found.append(session.evaluate(spec.uniform_plan(session.shape)).kl)
        del session
    assert found[1] == pytest.approx(found[0], rel=1e-4) and taken[1] < taken[0]


def test_no_window_waits_for_the_gpu() -> None:
    decoder = on_gpu("llama").decoder
    window = tiny_windows(1, 64).to(GPU)
    window_loss(decoder, window)  # kernels are loaded
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")  # warns that it is a prototype; see `exact`
        loss = window_loss(decoder, window)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


def test_attention_in_float32_keeps_far_less_than_all_pairs() -> None:
    seqlen = 8192
    query, key, value = (torch.randn(1, heads, seqlen, 64, device=GPU) for heads in (8, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    causal_attention(torch.nn.Identity(), query, key, value, None, scaling=0.125)
    assert torch.cuda.max_memory_allocated() - before < 8 * seqlen * seqlen


def all_that_is_left() -> Iterator[torch.Tensor]:
    """Take what torch has reserved, in smaller and smaller pieces."""
    for size in (2**20, 2**16, 512):
        with suppress(torch.OutOfMemoryError):
            while True:
                yield torch.empty(size, dtype=torch.uint8, device=GPU)


def test_a_plan_that_runs_out_of_memory_does_not_end_the_search(spec: SearchSpec) -> None:
    session = session_of(spec, on_gpu("llama"))
    request = {"plan": spec.uniform_plan(session.shape).model_dump(), "text": "fitness"}
    expected = answer(session, request)
    assert isinstance(expected, Measured)
    session.target.ordered.restore()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    taken = list(all_that_is_left())
    failed = answer(session, request)
    taken.clear()
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert not isinstance(failed, Measured) and failed.reason == "out-of-memory"  # type: ignore[union-attr]
    again = answer(session, request)
    assert isinstance(again, Measured) and again.perplexity == pytest.approx(expected.perplexity, rel=1e-6)


LOSE_THE_DEVICE = """
import torch
from types import SimpleNamespace
from gpu_worker.evaluation.outcomes import DeviceLostError, answer

def race(*_):
    torch.zeros(3, device="cuda")[torch.tensor([99], device="cuda")].tolist()

session = SimpleNamespace(race=race)
plan = {"layers": [{"kv_heads": 1, "queries_per_kv": 1, "mlp_channels": 1}]}
try:
    answer(session, {"plan": plan, "text": "fitness"})
except DeviceLostError:
    print("lost")
"""


def test_a_broken_context_is_recognised() -> None:
    done = subprocess.run([sys.executable, "-c", LOSE_THE_DEVICE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "lost", done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_computes_what_it_does_on_one() -> None:
    window = tiny_windows(1, 64)
    expected = final_hidden(on_gpu("llama").decoder, window).cpu()
    model = on_gpu("llama").causal_lm
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    places |= {"model.layers.2": 1, "model.norm": 1, "lm_head": 0}
    accelerate.dispatch_model(model, device_map=places)
    found = final_hidden(extract_decoder(model), window).cpu()
    assert torch.allclose(found, expected, atol=1e-5)
