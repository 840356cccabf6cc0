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

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gpu_worker.models.families import Layer
from gpu_worker.pruning.calibration import LayerActivations
from protocol.plans.shape import LayerShape

Projection = Literal["query", "key", "value", "output", "gate", "up", "down"]
ROWS_AT_ONCE = 1024
"""Rows of a weight that are in fp32 or fp64 at a time: whole, a large model's would be gigabytes."""
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
    sums = sum(rows.double().abs().sum(dim=0) for rows in torch.split(weight, ROWS_AT_ONCE))
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
    parts = [sum_salience(projection, rows.float().abs()) for rows in torch.split(weight, ROWS_AT_ONCE)]
    return torch.cat(parts) if projection in ROWS else torch.stack(parts).sum(dim=0)
