"""Activation statistics of the dense model, by hooks: what Wanda-sp needs to know about the calibration text."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpu_worker.families import Decoder
from gpu_worker.progress import Progress, no_progress


@dataclass(frozen=True)
class LayerActivations:
    """Mean of x_j² over all calibration tokens, per input column j, in fp64 on the layer's device."""

    attention_output: Tensor
    """Of o_proj, [query heads × head dim]."""
    mlp_output: Tensor
    """Of down_proj, [MLP channels]."""


class _SquareSum:
    """A forward pre-hook that adds up x_j² of a linear layer's input."""

    def __init__(self, linear: nn.Linear) -> None:
        self.total = torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Squared and summed in fp32 within a window: on a CPU ten times as fast as vector_norm. Not in place: of an
        # fp32 model `float()` returns the activations themselves, which the layer is about to read.
        self.total += inputs[0].flatten(0, -2).float().square().sum(dim=0)


def calibrate(decoder: Decoder, windows: Tensor, progress: Progress = no_progress) -> tuple[LayerActivations, ...]:
    """Run the dense model over `windows` (long, [n, seqlen]) and return the activations of each layer.

    No logits are computed.
    """
    device = next(decoder.body.parameters()).device
    with torch.inference_mode(), _square_sums(decoder) as sums:
        for done, window in enumerate(windows, start=1):
            decoder.body(input_ids=window[None].to(device), use_cache=False)
            progress("calibrating", done, len(windows))
    tokens = windows.numel()
    return tuple(LayerActivations(output.total / tokens, down.total / tokens) for output, down in sums)


@contextmanager
def _square_sums(decoder: Decoder) -> Iterator[list[tuple[_SquareSum, _SquareSum]]]:
    pairs = [(_SquareSum(layer.output), _SquareSum(layer.down)) for layer in decoder.layers]
    handles = []
    for layer, (output, down) in zip(decoder.layers, pairs, strict=True):
        handles.append(layer.output.register_forward_pre_hook(output))
        handles.append(layer.down.register_forward_pre_hook(down))
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()
