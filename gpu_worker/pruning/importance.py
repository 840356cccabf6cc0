"""Importance of heads and MLP channels (Wanda-sp, Taylor, magnitude): tensor functions. Low scores are pruned first.

**Wanda-sp** is the structured form of Wanda (Sun et al., 2023) that FLAP (An et al., 2023) uses as a baseline. The
score of an input column j of o_proj or down_proj is

    s_j = mean_i |W_ij| · √E[x_j²]

where W is the weight ([outputs, inputs]) and x the input of the column over the calibration tokens. A head's score is
the sum over its columns.

**Taylor** (LLM-Pruner, Ma et al., 2023, first order, element-wise) and **magnitude** sum an element-wise salience, |w ·
∂L/∂w| or |w|, over the weights that are removed with a piece: for a head, its rows of q, k and v and its columns of o;
for a channel, its rows of gate and up and its column of down. When query heads share a KV head, the rows of k and v
count only for the KV head. Biases are ignored, as in LLM-Pruner.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_worker.models.families import Decoder, Layer
from gpu_worker.models.limits import GRADIENT_SAMPLES, GRADIENT_TOKENS, ROWS_PER_CHUNK
from gpu_worker.progress import Progress, no_progress
from gpu_worker.pruning.calibration import LayerActivations
from protocol.plans.any_heads import AnyHeadsPlan, make_any_heads_plan
from protocol.plans.shape import LayerShape, ModelShape

Projection = Literal["query", "key", "value", "output", "gate", "up", "down"]
ROWS: tuple[Projection, ...] = ("query", "key", "value", "gate", "up")
"""Projections that lose rows (outputs)."""
COLUMNS: tuple[Projection, ...] = ("output", "down")
"""Projections that lose columns (inputs)."""


@dataclass(frozen=True)
class LayerImportance:
    """Scores of one layer's heads and MLP channels."""

    query_heads: Tensor
    """[KV heads, query heads per KV head]."""
    kv_heads: Tensor
    """[KV heads]. Each score includes the KV head's query heads."""
    channels: Tensor
    """[MLP channels]."""


def column_scores(weight: Tensor, mean_squares: Tensor) -> Tensor:
    """Return mean_i |W_ij| · √E[x_j²] for a weight [outputs, inputs] and mean squares [inputs]; fp64, [inputs]."""
    sums = sum(rows.double().abs().sum(dim=0) for rows in torch.split(weight, ROWS_PER_CHUNK))
    return sums / weight.shape[0] * mean_squares.double().sqrt()


def by_head(pieces: Tensor, shape: LayerShape) -> Tensor:
    """Sum `pieces` [query heads × head dim] over each query head; returns [KV heads, query heads per KV head].

    In `pieces`, query heads that share a KV head are adjacent.
    """
    return pieces.view(shape.kv_heads, shape.queries_per_kv, -1).sum(dim=2)


def wanda_sp(layer: Layer, activations: LayerActivations, shape: LayerShape) -> LayerImportance:
    """Return the Wanda-sp scores of one layer, fp64. A KV head's score is the sum of its query heads' scores."""
    query_heads = by_head(column_scores(layer.output.weight, activations.attention_output), shape)
    return LayerImportance(
        query_heads=query_heads,
        kv_heads=query_heads.sum(dim=1),
        channels=column_scores(layer.down.weight, activations.mlp_output),
    )


Salience = dict[Projection, Tensor]
"""The element-wise salience of each projection, summed over rows [outputs] or columns [inputs]."""


def sum_salience(projection: Projection, salience: Tensor) -> Tensor:
    """Sum a salience [outputs, inputs] over the inputs of each row, or over the outputs of each column; fp64."""
    return salience.sum(dim=1 if projection in ROWS else 0).double()


def grouped(salience: Salience, shape: LayerShape) -> LayerImportance:
    """Return the importance of each group of coupled weights."""
    query_heads = by_head(salience["query"] + salience["output"], shape)
    shared = (salience["key"] + salience["value"]).view(shape.kv_heads, -1).sum(dim=1)
    return LayerImportance(
        query_heads=query_heads,
        kv_heads=query_heads.sum(dim=1) + shared,
        channels=salience["gate"] + salience["up"] + salience["down"],
    )


def magnitude(layer: Layer, shape: LayerShape) -> LayerImportance:
    """Return the sum of |w| over each group of coupled weights of one layer. Needs no text."""
    return grouped({p: _sum_of_sizes(p, getattr(layer, p).weight) for p in ROWS + COLUMNS}, shape)


def _sum_of_sizes(projection: Projection, weight: Tensor) -> Tensor:
    """Return the salience |w| of a weight [outputs, inputs], computed some rows at a time."""
    parts = [sum_salience(projection, rows.float().abs()) for rows in torch.split(weight, ROWS_PER_CHUNK)]
    return torch.cat(parts) if projection in ROWS else torch.stack(parts).sum(dim=0)


def gradient_salience(decoder: Decoder, windows: Tensor, progress: Progress = no_progress) -> tuple[Salience, ...]:
    """Return |w · ∂L/∂w| of each layer, summed over rows or columns; L is the mean loss of the samples.

    `windows` is long, [n, seqlen]. Runs one backward pass over all samples, so gradients are summed over samples before
    their absolute value is taken. Each gradient is reduced and freed immediately.
    """
    tokens = windows[:GRADIENT_SAMPLES, :GRADIENT_TOKENS].to(decoder.device)
    progress("taking gradients", 0, 1)
    with torch.enable_grad(), _reduced_gradients(decoder) as salience:
        hidden = decoder.body(input_ids=tokens, use_cache=False).last_hidden_state
        logits = decoder.head(hidden[:, :-1]).float()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().to(logits.device)).backward()  # type: ignore[no-untyped-call]
    progress("taking gradients", 1, 1)
    return tuple(salience)


@contextmanager
def _reduced_gradients(decoder: Decoder) -> Iterator[list[Salience]]:
    """Yield a list of saliences, which a backward pass fills; it leaves no gradients on the weights."""
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


def any_heads_plan(
    rates: Sequence[float], importance: Sequence[LayerImportance], shape: ModelShape, *, multiple_of: int = 1
) -> AnyHeadsPlan:
    """Return the plan that prunes layers by `rates` and may remove any query heads (protocol/plans/any_heads.py).

    Raises BudgetError if the budget cannot be met.
    """
    scores = [layer.query_heads.tolist() for layer in importance]
    return make_any_heads_plan(rates, scores, shape, multiple_of=multiple_of)


def outlier_share(layer: Layer, seen: LayerActivations, threshold: float) -> float:
    """Return the percentage of entries of |W| · √E[x²] in a layer's projections that exceed `threshold` × their mean.

    This is D of Yin et al. (2024) for M = `threshold`, computed some rows at a time.
    """
    inputs = [seen.attention_input] * 3 + [seen.attention_output] + [seen.mlp_input] * 2 + [seen.mlp_output]
    pairs = [
        (rows, squares)
        for linear, squares in zip(layer.linears, inputs, strict=True)
        for rows in torch.split(linear.weight, ROWS_PER_CHUNK)
    ]
    entries = sum(rows.numel() for rows, _ in pairs)
    mean = sum(_scores(*pair).sum(dtype=torch.float64).item() for pair in pairs) / entries
    outliers = sum(int((_scores(*pair) > threshold * mean).sum()) for pair in pairs)
    return 100 * outliers / entries


def _scores(weight: Tensor, mean_squares: Tensor) -> Tensor:
    """Return |W| · √E[x²], fp32, [outputs, inputs]."""
    return weight.float().abs() * mean_squares.sqrt().float()
