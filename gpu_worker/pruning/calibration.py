"""Activation statistics by hooks: what Wanda-sp, OWL and reconstruction need to know about the calibration text.

Memory is bounded by one window's activations: only sums are kept of the others.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from gpu_worker.models.families import Decoder, Layer
from gpu_worker.progress import Progress, no_progress, steps

STRIP = 256
"""Inputs whose products are added up at once."""


@dataclass(frozen=True)
class LayerActivations:
    """Mean of x_j² over all calibration tokens, per input column j of the projections; fp64, on the layer's device."""

    attention_input: Tensor
    """Of q, k and v_proj, [hidden size]."""
    attention_output: Tensor
    """Of o_proj, [query heads × head dim]."""
    mlp_input: Tensor
    """Of gate and up_proj, [hidden size]."""
    mlp_output: Tensor
    """Of down_proj, [MLP channels]."""


@dataclass(frozen=True)
class LayerProducts:
    """E[x·xᵀ] over all calibration tokens of what enters the projections that lose columns; fp32, on their device."""

    attention_output: Tensor
    """Of o_proj, [query heads × head dim] twice."""
    mlp_output: Tensor
    """Of down_proj, [MLP channels] twice."""


class _InputSum(ABC):
    """A forward pre-hook that adds up something of a linear layer's input, token by token."""

    def __init__(self, linear: nn.Linear, total: Tensor) -> None:
        self.handle = linear.register_forward_pre_hook(self)
        self._total = total.to(linear.weight.device)
        self._tokens = 0

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0].flatten(0, -2)
        self._tokens += len(states)
        # Not to be changed in place: of an fp32 model `float()` returns what the layer is about to read.
        self._add(states.float())

    @abstractmethod
    def _add(self, states: Tensor) -> None:
        """Add `states` [tokens, inputs], fp32, to the total."""

    def mean(self) -> Tensor:
        """The mean over all tokens so far."""
        return self._total / self._tokens


class _SquareSum(_InputSum):
    """Adds up x_j²."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, torch.zeros(linear.in_features, dtype=torch.float64))

    def _add(self, states: Tensor) -> None:
        # Squared and summed in fp32 within a window: on a CPU ten times as fast as vector_norm.
        self._total += states.square().sum(dim=0)


class _ProductSum(_InputSum):
    """Adds up x·xᵀ: of a symmetric sum, in strips, little more than the upper half."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, torch.zeros(linear.in_features, linear.in_features))

    def _add(self, states: Tensor) -> None:
        for start in range(0, states.shape[1], STRIP):
            strip = slice(start, start + STRIP)
            self._total[strip, start:].addmm_(states[:, strip].t(), states[:, start:])

    def mean(self) -> Tensor:
        """Of the whole: the lower half is the upper one's mirror image."""
        upper = super().mean().triu()
        return upper + upper.triu(1).t()


class _Hooks:
    """Watches what enters some projections of one layer."""

    def __init__(self, *sums: _InputSum) -> None:
        self._sums = sums

    def _means(self) -> Iterator[Tensor]:
        return (seen.mean() for seen in self._sums)

    def close(self) -> None:
        """Stop watching."""
        for seen in self._sums:
            seen.handle.remove()


class ActivationHooks(_Hooks):
    """Watches what enters each kind of projection of one layer."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(*(_SquareSum(linear) for linear in (layer.query, layer.output, layer.gate, layer.down)))

    def activations(self) -> LayerActivations:
        """What was seen so far."""
        return LayerActivations(*self._means())


class ProductHooks(_Hooks):
    """Watches what enters the projections of one layer that lose columns."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(*(_ProductSum(linear) for linear in (layer.output, layer.down)))

    def products(self) -> LayerProducts:
        """What was seen so far."""
        return LayerProducts(*self._means())


W = TypeVar("W", bound=_Hooks)


@contextmanager
def hooked(watch: Callable[[Layer], W], *layers: Layer) -> Iterator[tuple[W, ...]]:
    """Watch `layers` while it lasts."""
    watches = tuple(watch(layer) for layer in layers)
    try:
        yield watches
    finally:
        for each in watches:
            each.close()


def calibrate(decoder: Decoder, windows: Tensor, progress: Progress = no_progress) -> tuple[LayerActivations, ...]:
    """Run the dense model over `windows` (long, [n, seqlen]) and return the activations of each layer."""
    with hooked(ActivationHooks, *decoder.layers) as watches:
        _run(decoder, windows, progress, "calibrating")
    return tuple(watch.activations() for watch in watches)


def calibrate_products(
    decoder: Decoder, windows: Tensor, progress: Progress = no_progress
) -> tuple[tuple[LayerActivations, ...], Iterator[LayerProducts]]:
    """As `calibrate`, and in the same pass the products of what enters each layer's projections, layer by layer.

    Each layer's sums are let go as the next one's are asked for: of a large model they are many gigabytes.
    """
    with hooked(ActivationHooks, *decoder.layers) as watches, hooked(ProductHooks, *decoder.layers) as products:
        _run(decoder, windows, progress, "calibrating")
    return tuple(watch.activations() for watch in watches), _handed_out(list(reversed(products)))


def _handed_out(watches: list[ProductHooks]) -> Iterator[LayerProducts]:
    """The last one first, which is forgotten then."""
    while watches:
        yield watches.pop().products()


def _run(decoder: Decoder, windows: Tensor, progress: Progress, stage: str) -> None:
    """No logits are computed."""
    with torch.inference_mode():
        for window in steps(progress, stage, windows):
            decoder.body(input_ids=window[None].to(decoder.device), use_cache=False)
