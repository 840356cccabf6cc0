from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from gpu_worker.models import attention
from gpu_worker.models.attention import causal_attention, whole_windows
from gpu_worker.models.families import FAMILIES
from tests.support.tiny_models import tiny_model, tiny_windows

WINDOWS = tiny_windows(2, 150)


def heads(dtype: torch.dtype, *, seqlen: int = 150, kv: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, seqlen, 16, generator=generator).to(dtype) for n in (6, kv, kv))  # type: ignore[return-value]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_model_computes_the_same_as_with_the_attention_of_transformers(
    family: str, dtype: torch.dtype, within: float
) -> None:
    sliding = {"sliding_window": 40} if family in ("mistral", "gemma3_text", "phi3") else {}
    model = tiny_model(family, dtype=dtype, **sliding)
    with torch.inference_mode():
        expected = model.decoder.body(input_ids=WINDOWS).last_hidden_state
        with whole_windows(model.decoder):
            found = model.decoder.body(input_ids=WINDOWS).last_hidden_state
        again = model.decoder.body(input_ids=WINDOWS).last_hidden_state
    assert (found - expected).abs().max() <= within * expected.abs().max()
    assert torch.equal(again, expected), "transformers' attention is back"


@pytest.mark.parametrize("window", [None, 1, 7, 149, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_sees_the_tokens_up_to_itself(window: int | None, dtype: torch.dtype) -> None:
    query, key, value = heads(dtype)
    found, _ = causal_attention(torch.nn.Identity(), query, key, value, None, scaling=0.3, sliding_window=window)
    wide = [part.double().repeat_interleave(6 // part.shape[1], 1) for part in (query, key, value)]
    apart = torch.arange(150)[:, None] - torch.arange(150)
    seen = (apart >= 0) & (apart < (window or 150))
    scores = (wide[0] @ wide[1].transpose(-1, -2) * 0.3).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ wide[2]).transpose(1, 2)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize(("dtype", "kv_heads"), [(torch.float32, 6), (torch.bfloat16, 3)])
def test_float32_on_a_gpu_never_takes_the_kernel_that_keeps_all_pairs(
    dtype: torch.dtype, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has a kernel for grouped queries that keeps no pairs only in half precision."""
    asked: list[tuple[int, Any]] = []

    def spied(query: torch.Tensor, key: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        asked.append((key.shape[1], options["enable_gqa"]))
        return torch.empty(query.shape, device="cpu")

    def repeated(heads: torch.Tensor, times: int) -> torch.Tensor:
        return torch.empty(1, heads.shape[1] * times, 32, 16)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    monkeypatch.setattr(attention, "repeat_kv", repeated)  # it cannot run without CUDA
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (torch.empty(1, n, 32, 16, dtype=dtype, device="cuda") for n in (6, 3, 3))
        causal_attention(torch.nn.Identity(), query, key, value, None, scaling=1.0)
    assert asked == [(kv_heads, kv_heads == 3)]
