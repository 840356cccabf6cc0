"""Half-precision matrix products on CPUs without instructions for them.

On such CPUs, torch multiplies bfloat16 and float16 several times slower than float32. Here the same products are
computed in float32 and rounded once at the end, as CPUs with these instructions do. Weights and activations keep their
dtype.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import structlog
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

log = structlog.get_logger()

MIN_ROWS = 8
"""Minimum number of input rows for which a product is computed in float32. With fewer rows, converting the weight costs
more time than it saves."""
CHUNK_ELEMENTS = 2**22
"""Number of weight elements converted at a time, few enough to fit the CPU's caches."""


def is_slow(dtype: torch.dtype) -> bool:
    """Return whether this CPU lacks instructions for products of `dtype`, according to torch."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    found = torch.ops.mkldnn
    return not (found._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else found._is_mkldnn_fp16_supported())


def warn_if_slow(dtype: str, device: torch.device, than: str) -> None:
    """Log a warning if this CPU is slow in `dtype`; `than` tells how much faster float32 is."""
    if device.type == "cpu" and is_slow(getattr(torch, dtype)):
        advice = f"this CPU has no instructions for it, and {than} in float32"
        log.warning("half_precision_is_slow", dtype=dtype, advice=advice)


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Compute this thread's linear layers on the CPU in float32 for those half-precision types that are slow."""
    slow = frozenset(dtype for dtype in (torch.bfloat16, torch.float16) if is_slow(dtype))
    if not slow or torch.cuda.is_available():
        yield
        return
    with _LinearInFloat32(slow):
        yield


class _LinearInFloat32(TorchFunctionMode):
    def __init__(self, dtypes: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs and self._is_for_us(args[0], args[1]):
            return _Linear.apply(*args, *(None,) * (3 - len(args)))  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))

    def _is_for_us(self, x: Tensor, weight: Tensor) -> bool:
        return (
            weight.dim() == 2
            and weight.numel() > 0
            and x.dtype == weight.dtype
            and x.dtype in self._dtypes
            and x.device.type == weight.device.type == "cpu"
            and x.numel() >= MIN_ROWS * x.shape[-1]
        )


class _Linear(torch.autograd.Function):
    """F.linear that saves only the inputs that the backward pass needs, unconverted. Does not support torch.func."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = context.needs_input_grad
        context.save_for_backward(x if of_weight else None, weight if of_x else None)
        wide = x.float()
        parts = _parts(weight)
        biases = (None,) * len(parts) if bias is None else torch.split(bias.float(), len(parts[0]))
        found = [F.linear(wide, part.float(), add).to(x.dtype) for part, add in zip(parts, biases, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = context.saved_tensors
        (gradient,) = gradients
        wide = gradient.float()
        rows = wide.flatten(0, -2)
        of_x = of_weight = None
        if weight is not None:
            parts = _parts(weight)
            slices = torch.split(wide, len(parts[0]), dim=-1)
            of_x = wide.new_zeros(*wide.shape[:-1], weight.shape[1])
            for some, part in zip(slices, parts, strict=True):
                of_x += some @ part.float()
        if x is not None:
            of_weight = rows.t() @ x.flatten(0, -2).float()
        of_bias = rows.sum(0).to(gradient.dtype) if context.needs_input_grad[2] else None
        return (
            None if of_x is None else of_x.to(gradient.dtype),
            None if of_weight is None else of_weight.to(gradient.dtype),
            of_bias,
        )


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Split `weight` [out, in] into the rows that are converted at a time."""
    return torch.split(weight, max(1, CHUNK_ELEMENTS // weight.shape[1]))
