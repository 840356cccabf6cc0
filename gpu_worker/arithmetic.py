"""Matrix products of half precision on CPUs that have no instructions for it.

There torch multiplies bfloat16 and float16 several times slower than float32. The same products are computed in
float32 here and rounded once, at the end, as CPUs with instructions do. Weights and activations stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 8
"""With fewer, converting the weight takes longer than is gained."""
CONVERTED = 2**22
"""Numbers of a weight that are converted at a time: what fits the caches needs no new memory."""


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for products of `dtype`, as torch itself finds."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return True
    found = torch.ops.mkldnn
    return not (found._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else found._is_mkldnn_fp16_supported())


@contextmanager
def products_in_float32() -> Iterator[None]:
    """While it lasts, this thread's linear layers on the CPU are computed so, in those types that are slow there."""
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
            x.dtype == weight.dtype
            and x.dtype in self._dtypes
            and x.device.type == weight.device.type == "cpu"
            and x.numel() >= FEWEST_ROWS * x.shape[-1]
        )


class _Linear(torch.autograd.Function):
    """F.linear; for its gradients the inputs are kept as they came, not in float32."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(x, weight)
        wide = x.float()
        parts = torch.split(weight, max(1, CONVERTED // weight.shape[1]))
        biases = (None,) * len(parts) if bias is None else torch.split(bias.float(), parts[0].shape[0])
        found = [F.linear(wide, part.float(), add).to(x.dtype) for part, add in zip(parts, biases, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = context.saved_tensors
        gradient = gradients[0].float()
        rows = gradient.flatten(0, -2)
        of_x, of_weight, of_bias = context.needs_input_grad
        return (
            (gradient @ weight.float()).to(x.dtype) if of_x else None,
            (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype) if of_weight else None,
            rows.sum(0).to(x.dtype) if of_bias else None,
        )
