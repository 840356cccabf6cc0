"""Importance of heads and MLP channels. Pure tensor functions; the least important pieces are removed first.

**Wanda-sp** is the structured form of Wanda (Sun et al., 2023) that FLAP (An et al., 2023) compares itself with: the
score of an input column j of o_proj or down_proj is

    s_j = mean_i |W_ij| · √E[x_j²]

with W the weight ([outputs, inputs]) and x the column's input over the calibration tokens. A head's score is the sum
over its columns.

**Taylor** (LLM-Pruner, Ma et al., 2023, first order, element-wise) and **magnitude** sum an element-wise salience,
|w · ∂L/∂w| or |w|, over the group of weights that goes with a piece: a head's rows of q, k and v and its columns of o;
a channel's rows of gate and up and its column of down. Where query heads share a KV head, the rows of k and v count
for the KV head alone. Biases are left out, as LLM-Pruner does.
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
"""Projections of which pruning takes rows (outputs)."""
COLUMNS: tuple[Projection, ...] = ("output", "down")
"""Projections of which it takes columns (inputs)."""


@dataclass(frozen=True)
class LayerImportance:
    """Scores of one layer's removable pieces."""

    query_heads: Tensor
    """[KV heads, query heads per KV head]."""
    kv_heads: Tensor
    """[KV heads]: of a KV head together with its query heads."""
    channels: Tensor
    """[MLP channels]."""


def column_scores(weight: Tensor, mean_squares: Tensor) -> Tensor:
    """s_j = mean_i |W_ij| · √E[x_j²] for a weight [outputs, inputs] and mean squares [inputs]; fp64, [inputs]."""
    sums = sum(rows.double().abs().sum(dim=0) for rows in torch.split(weight, ROWS_PER_CHUNK))
    return sums / weight.shape[0] * mean_squares.double().sqrt()


def by_head(pieces: Tensor, shape: LayerShape) -> Tensor:
    """Sums over each query head of [query heads × head dim]: [KV heads, query heads per KV head].

    Query heads that share a KV head lie next to each other, [KV head, query head, head dim].
    """
    return pieces.view(shape.kv_heads, shape.queries_per_kv, -1).sum(dim=2)


def wanda_sp(layer: Layer, activations: LayerActivations, shape: LayerShape) -> LayerImportance:
    """The Wanda-sp scores of one layer, fp64: a KV head is worth what its query heads are."""
    query_heads = by_head(column_scores(layer.output.weight, activations.attention_output), shape)
    return LayerImportance(
        query_heads=query_heads,
        kv_heads=query_heads.sum(dim=1),
        channels=column_scores(layer.down.weight, activations.mlp_output),
    )


Salience = dict[Projection, Tensor]
"""Per projection, the element-wise salience summed to what pruning takes of it: rows [outputs] or columns [inputs]."""


def sum_salience(projection: Projection, salience: Tensor) -> Tensor:
    """Sum a salience [outputs, inputs] over the inputs of each row, or over the outputs of each column; fp64."""
    return salience.sum(dim=1 if projection in ROWS else 0).double()


def grouped(salience: Salience, shape: LayerShape) -> LayerImportance:
    """The importance of each group of coupled weights."""
    query_heads = by_head(salience["query"] + salience["output"], shape)
    shared = (salience["key"] + salience["value"]).view(shape.kv_heads, -1).sum(dim=1)
    return LayerImportance(
        query_heads=query_heads,
        kv_heads=query_heads.sum(dim=1) + shared,
        channels=salience["gate"] + salience["up"] + salience["down"],
    )


def magnitude(layer: Layer, shape: LayerShape) -> LayerImportance:
    """The sum of |w| over each group of one layer; no text is needed."""
    return grouped({p: _sum_of_sizes(p, getattr(layer, p).weight) for p in ROWS + COLUMNS}, shape)


def _sum_of_sizes(projection: Projection, weight: Tensor) -> Tensor:
    """The salience |w| of a weight [outputs, inputs], some rows at a time."""
    parts = [sum_salience(projection, rows.float().abs()) for rows in torch.split(weight, ROWS_PER_CHUNK)]
    return torch.cat(parts) if projection in ROWS else torch.stack(parts).sum(dim=0)


def gradient_salience(decoder: Decoder, windows: Tensor, progress: Progress = no_progress) -> tuple[Salience, ...]:
    """Per layer, |w · ∂L/∂w| summed over rows or columns, L being the mean loss of samples.

    `windows` is long, [n, seqlen]. One backward pass over all samples: a weight's gradient is summed over them before
    its size is taken. Each gradient is reduced and dropped as soon as it is there.
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


def any_heads_plan(
    rates: Sequence[float], importance: Sequence[LayerImportance], shape: ModelShape, *, multiple_of: int = 1
) -> AnyHeadsPlan:
    """Return the plan that prunes layers by `rates` and may remove any query heads (protocol/plans/any_heads.py).

    Raises BudgetError where the budget cannot be met.
    """
    scores = [layer.query_heads.tolist() for layer in importance]
    return make_any_heads_plan(rates, scores, shape, multiple_of=multiple_of)


def outlier_share(layer: Layer, seen: LayerActivations, threshold: float) -> float:
    """Percent of the entries of |W| · √E[x²] over all projections of a layer that exceed `threshold` × their mean.

    As Yin et al. (2024) define D for M = `threshold`; some rows at a time.
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
    """|W| · √E[x²], fp32, [outputs, inputs]."""
    return weight.float().abs() * mean_squares.sqrt().float()
