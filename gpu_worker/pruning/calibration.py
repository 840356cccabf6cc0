"""Collects activation statistics of the calibration text with hooks, for Wanda-sp, OWL and reconstruction.

Memory is bounded by one window's activations, because only sums are kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from gpu_worker.models.attention import whole_windows
from gpu_worker.models.families import Decoder, Layer
from gpu_worker.progress import Progress, no_progress, steps
from gpu_worker.pruning.layerwise import LayerRun

STRIP = 256
"""Number of inputs whose products are computed at once."""


@dataclass(frozen=True)
class LayerActivations:
    """Mean of x_j² over all calibration tokens per input column j of the projections; fp64, on the layer's device."""

    attention_input: Tensor
    """Input of q, k and v_proj, [hidden size]."""
    attention_output: Tensor
    """Input of o_proj, [query heads × head dim]."""
    mlp_input: Tensor
    """Input of gate and up_proj, [hidden size]."""
    mlp_output: Tensor
    """Input of down_proj, [MLP channels]."""


@dataclass(frozen=True)
class LayerProducts:
    """E[x·xᵀ] over all calibration tokens, for the inputs x of projections that lose columns; fp32."""

    attention_output: Tensor
    """Input of o_proj, [query heads × head dim] squared."""
    mlp_output: Tensor
    """Input of down_proj, [MLP channels] squared."""


class _InputSum(ABC):
    """A forward pre-hook that sums a statistic of a linear layer's input over tokens."""

    def __init__(self, linear: nn.Linear, total: Tensor) -> None:
        self.handle = linear.register_forward_pre_hook(self)
        self._total = total.to(linear.weight.device)
        self._tokens = 0

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0].flatten(0, -2)
        self._tokens += len(states)
        # `_add` must not change its argument in place: for an fp32 model, `float()` returns the layer's own input.
        self._add(states.float())

    @abstractmethod
    def _add(self, states: Tensor) -> None:
        """Add `states` [tokens, inputs], fp32, to the total."""

    def mean(self) -> Tensor:
        """Return the mean over all tokens so far."""
        return self._total / self._tokens


class _SquareSum(_InputSum):
    """Sums x_j²."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, torch.zeros(linear.in_features, dtype=torch.float64))

    def _add(self, states: Tensor) -> None:
        # Within a window, squares are summed in fp32, which is ten times faster than vector_norm on a CPU.
        self._total += states.square().sum(dim=0)


class _ProductSum(_InputSum):
    """Sums x·xᵀ. Since the sum is symmetric, only strips of its upper half are computed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, torch.zeros(linear.in_features, linear.in_features))

    def _add(self, states: Tensor) -> None:
        for start in range(0, states.shape[1], STRIP):
            strip = slice(start, start + STRIP)
            self._total[strip, start:].addmm_(states[:, strip].t(), states[:, start:])

    def mean(self) -> Tensor:
        """Return the full symmetric mean, mirrored from the upper half."""
        upper = super().mean().triu()
        return upper + upper.triu(1).t()


class _Hooks:
    """Hooks on the inputs of some projections of one layer."""

    def __init__(self, *sums: _InputSum) -> None:
        self._sums = sums

    def _means(self) -> Iterator[Tensor]:
        return (seen.mean() for seen in self._sums)

    def close(self) -> None:
        """Remove the hooks."""
        for seen in self._sums:
            seen.handle.remove()


class ActivationHooks(_Hooks):
    """Hooks that collect the mean squares of one layer's projection inputs."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(*(_SquareSum(linear) for linear in (layer.query, layer.output, layer.gate, layer.down)))

    def activations(self) -> LayerActivations:
        """Return the statistics so far."""
        return LayerActivations(*self._means())


class ProductHooks(_Hooks):
    """Hooks that collect the input products of one layer's o_proj and down_proj."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(*(_ProductSum(linear) for linear in (layer.output, layer.down)))

    def products(self) -> LayerProducts:
        """Return the statistics so far."""
        return LayerProducts(*self._means())


W = TypeVar("W", bound=_Hooks)


@contextmanager
def hooked(make_hooks: Callable[[Layer], W], *layers: Layer) -> Iterator[tuple[W, ...]]:
    """Attach hooks to `layers`, and remove them on exit."""
    hooks = tuple(make_hooks(layer) for layer in layers)
    try:
        yield hooks
    finally:
        for each in hooks:
            each.close()


def calibrate(decoder: Decoder, windows: Tensor, progress: Progress = no_progress) -> tuple[LayerActivations, ...]:
    """Run the dense model over `windows` (long, [n, seqlen]) and return the activations of each layer."""
    with hooked(ActivationHooks, *decoder.layers) as hooks:
        _run(decoder, windows, progress, "calibrating")
    return tuple(each.activations() for each in hooks)


def calibrate_products(
    decoder: Decoder, windows: Tensor, progress: Progress = no_progress
) -> tuple[tuple[LayerActivations, ...], Iterator[LayerProducts]]:
    """Calibrate as `calibrate` does, and in the same pass collect the input products, returned layer by layer.

    Each layer's sums are freed when the next layer is requested, because they take many gigabytes for a large model.
    """
    with hooked(ActivationHooks, *decoder.layers) as hooks, hooked(ProductHooks, *decoder.layers) as products:
        _run(decoder, windows, progress, "calibrating")
    return tuple(each.activations() for each in hooks), _drained(list(reversed(products)))


def calibrate_layer_by_layer(
    decoder: Decoder, windows: Tensor, progress: Progress = no_progress
) -> tuple[tuple[LayerActivations, ...], list[LayerProducts]]:
    """Return what `calibrate_products` does, with the products in main memory and only one layer's on the device."""
    run = LayerRun(decoder, windows)
    seen, products = [], []
    for i, layer in enumerate(steps(progress, "calibrating", decoder.layers)):
        with hooked(ActivationHooks, layer) as (activations,), hooked(ProductHooks, layer) as (inputs,):
            run.advance(i)
        seen.append(activations.activations())
        found = inputs.products()
        products.append(LayerProducts(found.attention_output.cpu(), found.mlp_output.cpu()))
    return tuple(seen), products


def _drained(hooks: list[ProductHooks]) -> Iterator[LayerProducts]:
    """Yield the products of each hook, from the last hook to the first, and drop the hook."""
    while hooks:
        yield hooks.pop().products()


def _run(decoder: Decoder, windows: Tensor, progress: Progress, stage: str) -> None:
    """Run the decoder's body over `windows` without computing logits."""
    with torch.inference_mode(), whole_windows(decoder):
        for window in steps(progress, stage, windows):
            decoder.body(input_ids=window[None].to(decoder.device), use_cache=False)
