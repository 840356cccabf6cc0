"""OWL's layer-wise outlier distribution: how many weights of a layer stand out from the others."""

import torch
from torch import Tensor

from gpu_worker.models.families import Layer
from gpu_worker.pruning.calibration import LayerActivations
from gpu_worker.pruning.importance import ROWS_AT_ONCE


def outlier_share(layer: Layer, seen: LayerActivations, threshold: float) -> float:
    """Percent of the entries of |W| · √E[x²] over all projections of a layer that exceed `threshold` × their mean.

    As Yin et al. (2024) define D for M = `threshold`; some rows at a time.
    """
    inputs = [seen.attention_input] * 3 + [seen.attention_output] + [seen.mlp_input] * 2 + [seen.mlp_output]
    pairs = [
        (rows, squares)
        for linear, squares in zip(layer.linears, inputs, strict=True)
        for rows in torch.split(linear.weight, ROWS_AT_ONCE)
    ]
    entries = sum(rows.numel() for rows, _ in pairs)
    mean = sum(_scores(*pair).sum(dtype=torch.float64).item() for pair in pairs) / entries
    outliers = sum(int((_scores(*pair) > threshold * mean).sum()) for pair in pairs)
    return 100 * outliers / entries


def _scores(weight: Tensor, mean_squares: Tensor) -> Tensor:
    """|W| · √E[x²], fp32, [outputs, inputs]."""
    return weight.float().abs() * mean_squares.sqrt().float()
