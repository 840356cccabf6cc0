"""|w · ∂L/∂w| of every projection: what Taylor importance needs to know about the calibration text."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_worker.models.families import Decoder
from gpu_worker.progress import Progress, no_progress
from gpu_worker.pruning.importance import COLUMNS, ROWS, Projection, Salience, sum_salience

SAMPLES = 10
TOKENS = 64
"""Samples of so many tokens, as LLM-Pruner takes: the beginnings of the calibration windows."""


def gradient_salience(decoder: Decoder, windows: Tensor, progress: Progress = no_progress) -> tuple[Salience, ...]:
    """Per layer, |w · ∂L/∂w| summed over rows or columns, L being the mean loss of samples.

    `windows` is long, [n, seqlen]. One backward pass over all samples: a weight's gradient is summed over them before
    its size is taken. Each gradient is reduced and dropped as soon as it is there.
    """
    tokens = windows[:SAMPLES, :TOKENS].to(decoder.device)
    progress("taking gradients", 0, 1)
    with torch.enable_grad(), _reduced_gradients(decoder) as salience:
        hidden = decoder.body(input_ids=tokens, use_cache=False).last_hidden_state
        logits = decoder.head(hidden[:, :-1]).float()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device)).backward()  # type: ignore[no-untyped-call]
    progress("taking gradients", 1, 1)
    return tuple(salience)


@contextmanager
def _reduced_gradients(decoder: Decoder) -> Iterator[list[Salience]]:
    """While it lasts, a backward pass fills the list instead of the weights' gradients."""
    found: list[Salience] = [{} for _ in decoder.layers]
    handles = []
    for layer, salience in zip(decoder.layers, found, strict=True):
        for projection in ROWS + COLUMNS:

            def reduce(weight: Tensor, projection: Projection = projection, salience: Salience = salience) -> None:
                assert weight.grad is not None
                salience[projection] = sum_salience(projection, (weight.detach().float() * weight.grad.float()).abs())
                weight.grad = None

            weight = getattr(layer, projection).weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(reduce))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for layer in decoder.layers:
            for linear in layer.linears:
                linear.weight.requires_grad_(False).grad = None
