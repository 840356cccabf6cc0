"""Importance of heads and MLP channels. Pure tensor functions.

Wanda-sp is the structured form of Wanda (Sun et al., 2023) that FLAP (An et al., 2023) compares itself with: the score
of an input column j of o_proj or down_proj is

    s_j = mean_i |W_ij| · √E[x_j²]

with W the weight ([outputs, inputs]) and x the column's input over the calibration tokens. A head's score is the sum
over its columns.
"""

from dataclasses import dataclass

from torch import Tensor

from gpu_worker.calibration import LayerActivations
from gpu_worker.families import Layer
from protocol.shape import LayerShape


@dataclass(frozen=True)
class LayerImportance:
    """Scores of one layer's removable pieces, fp64; the least important go first."""

    query_heads: Tensor
    """[KV heads, query heads per KV head]."""
    channels: Tensor
    """[MLP channels]."""

    @property
    def kv_heads(self) -> Tensor:
        """[KV heads]: a KV head is worth what its query heads are."""
        return self.query_heads.sum(dim=1)


def column_scores(weight: Tensor, mean_squares: Tensor) -> Tensor:
    """s_j = mean_i |W_ij| · √E[x_j²] for a weight [outputs, inputs] and mean squares [inputs]; fp64, [inputs]."""
    return weight.double().abs().mean(dim=0) * mean_squares.double().sqrt()


def head_scores(columns: Tensor, shape: LayerShape) -> Tensor:
    """Sum of the column scores of each query head, [KV heads, query heads per KV head].

    Query heads that share a KV head lie next to each other in o_proj's columns, [KV head, query head, head dim].
    """
    return columns.view(shape.kv_heads, shape.queries_per_kv, -1).sum(dim=2)


def wanda_sp(layer: Layer, activations: LayerActivations, shape: LayerShape) -> LayerImportance:
    """The Wanda-sp scores of one layer."""
    return LayerImportance(
        query_heads=head_scores(column_scores(layer.output.weight, activations.attention_output), shape),
        channels=column_scores(layer.down.weight, activations.mlp_output),
    )
