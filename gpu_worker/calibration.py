"""Activation statistics by hooks: what Wanda-sp and OWL need to know about the calibration text.

Memory is bounded by one window's activations: only sums are kept of the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpu_worker.families import Decoder, Layer
from gpu_worker.progress import Progress, no_progress, steps


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


class _SquareSum:
    """A forward pre-hook that adds up x_j² of a linear layer's input."""

    def __init__(self, linear: nn.Linear) -> None:
        self.handle = linear.register_forward_pre_hook(self)
        self._total = torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        self._tokens = 0

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states = inputs[0].flatten(0, -2)
        self._tokens += len(states)
        # Squared and summed in fp32 within a window: on a CPU ten times as fast as vector_norm. Not in place: of an
        # fp32 model `float()` returns the activations themselves, which the layer is about to read.
        self._total += states.float().square().sum(dim=0)

    def mean(self) -> Tensor:
        """Mean of x_j² over all tokens so far."""
        return self._total / self._tokens


class LayerWatch:
    """Watches what enters the projections of one layer."""

    def __init__(self, layer: Layer) -> None:
        self._sums = [_SquareSum(linear) for linear in (layer.query, layer.output, layer.gate, layer.down)]

    def activations(self) -> LayerActivations:
        """What was seen so far."""
        return LayerActivations(*(seen.mean() for seen in self._sums))

    def close(self) -> None:
        """Stop watching."""
        for seen in self._sums:
            seen.handle.remove()


@contextmanager
def watching(*layers: Layer) -> Iterator[tuple[LayerWatch, ...]]:
    """Watch `layers` while it lasts."""
    watches = tuple(LayerWatch(layer) for layer in layers)
    try:
        yield watches
    finally:
        for watch in watches:
            watch.close()


def calibrate(decoder: Decoder, windows: Tensor, progress: Progress = no_progress) -> tuple[LayerActivations, ...]:
    """Run the dense model over `windows` (long, [n, seqlen]) and return the activations of each layer.

    No logits are computed.
    """
    with torch.inference_mode(), watching(*decoder.layers) as watches:
        for window in steps(progress, "calibrating", windows):
            decoder.body(input_ids=window[None].to(decoder.device), use_cache=False)
    return tuple(watch.activations() for watch in watches)
