"""Products in float32 where the CPU has no instructions for bfloat16: the same, sooner, and with the same gradients."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_worker.measuring import half_precision as arithmetic
from gpu_worker.measuring.half_precision import MIN_ROWS, products_in_float32
from gpu_worker.measuring.perplexity import perplexity
from tests.support.tiny_models import tiny_model, tiny_windows

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU without instructions for half precision, and no GPU."""
    monkeypatch.setattr(arithmetic, "is_slow", lambda dtype: dtype in HALF)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with products_in_float32():
        yield


def samples(dtype: torch.dtype, *leading: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((*leading, 24), (40, 24), (40,))
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


@pytest.fixture(params=[arithmetic.CHUNK_ELEMENTS, 24 * 7], ids=["whole", "in parts"])
def converted(slow: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices are converted as a whole, or in parts."""
    monkeypatch.setattr(arithmetic, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("dtype", HALF)
def test_a_product_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight, bias = samples(dtype, 3, 5)
    for added in (None, bias):
        exact = F.linear(x.double(), weight.double(), added if added is None else added.double())
        found = F.linear(x, weight, added)
        assert found.dtype == dtype and found.shape == (3, 5, 40)
        assert torch.allclose(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_those_of_float32_rounded(dtype: torch.dtype) -> None:
    def gradients(inputs: tuple[Tensor, ...], weights: Tensor) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in inputs]
        (F.linear(*leaves) * weights).sum().backward()  # type: ignore[no-untyped-call]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    inputs = samples(dtype, 2, 9)
    weights = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = gradients(inputs, weights)
    wide = gradients(tuple(each.float() for each in inputs), weights.float())
    assert [each.dtype for each in found] == [dtype] * 3
    for half, full in zip(found, wide, strict=True):
        assert torch.allclose(half.float(), full, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.usefixtures("slow")
def test_of_a_frozen_weight_no_inputs_are_kept() -> None:
    x, weight, _ = samples(torch.bfloat16, 16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: kept[0]):
        F.linear(x.clone().requires_grad_(), weight)
    assert [tuple(each.shape) for each in kept] == [(40, 24)]
    x.requires_grad_()
    F.linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize(
    ("dtype", "rows", "ours"),
    [(torch.bfloat16, MIN_ROWS, True), (torch.bfloat16, MIN_ROWS - 1, False), (torch.float32, 64, False)],
    ids=["many rows", "few rows", "float32"],
)
@pytest.mark.usefixtures("slow")
def test_only_what_is_slow_is_computed_so(
    dtype: torch.dtype, rows: int, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(*inputs: Tensor | None) -> Tensor:
        asked.append(inputs)
        return apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]

    asked: list[object] = []
    apply = arithmetic._Linear.apply
    monkeypatch.setattr(arithmetic._Linear, "apply", noted)
    x, weight, _ = samples(dtype, rows)
    layer = nn.Linear(24, 40, bias=False, dtype=dtype)
    assert layer(x).dtype == F.linear(x, weight).dtype == dtype
    assert len(asked) == (2 if ours else 0)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(("inputs", "outputs"), [(16, None), (0, 40)], ids=["a vector", "nothing to add up"])
def test_odd_shapes_are_left_to_torch(inputs: int, outputs: int | None) -> None:
    x = torch.ones(16, inputs, dtype=torch.bfloat16)
    weight = torch.ones(*(() if outputs is None else (outputs,)), inputs, dtype=torch.bfloat16)
    assert (F.linear(x, weight) == inputs).all()


def test_torch_itself_says_what_is_slow() -> None:
    assert not arithmetic.is_slow(torch.float32)
    assert not arithmetic.is_slow(torch.float64)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert arithmetic.is_slow(torch.bfloat16) and arithmetic.is_slow(torch.float16)


def test_where_the_cpu_has_instructions_or_a_gpu_computes_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = torch.overrides._get_current_function_mode_stack
    before = modes()  # type: ignore[no-untyped-call]
    for slow_types, on_gpu in (((), False), (HALF, True)):
        monkeypatch.setattr(arithmetic, "is_slow", slow_types.__contains__)
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        with products_in_float32():
            assert modes() == before  # type: ignore[no-untyped-call]


def test_a_model_measures_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model("llama"), tiny_windows(3, 64)
    model.causal_lm.to(torch.bfloat16)
    with torch._C.DisableTorchFunction():  # torch alone, whatever this CPU has
        before, _ = perplexity(model.decoder, windows)
    monkeypatch.setattr(arithmetic, "is_slow", HALF.__contains__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with products_in_float32():
        assert perplexity(model.decoder, windows)[0] == pytest.approx(before, rel=1e-3)
