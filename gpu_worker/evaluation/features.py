"""Measures the features of units that rules compute with, on the dense model (protocol/plans/features.py).

They need one short forward pass, and otherwise what calibration left: scores, and the factors of the least-squares fit.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpu_worker.evaluation.sensitivity import beginnings
from gpu_worker.models.attention import whole_windows
from gpu_worker.models.families import Decoder, Layer
from gpu_worker.models.limits import ROWS_PER_CHUNK
from gpu_worker.pruning.importance import LayerImportance
from gpu_worker.pruning.layerwise import record_calls
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import LayerPlan
from protocol.plans.shape import Unit
from protocol.plans.single_unit_pruning import single_unit_plan
from protocol.plans.spec import SearchSpec


def measure_features(
    ordered: OrderedModel, importance: Sequence[LayerImportance], spec: SearchSpec, text: Tensor
) -> dict[str, tuple[float, ...]]:
    """Return `influence`, `fit_error`, `lost_score` and `weight`, raw, with one value per unit.

    `text` is long, [n, seqlen], of which the beginnings of a few windows are used. `fit_error` is left out unless the
    spec fits by least squares. The model is dense before and after.
    """
    ordered.restore()
    decoder = ordered.decoder
    units = decoder.shape.units(spec.granularity)
    plans = [single_unit_plan(unit, spec, decoder.shape) for unit in units]
    influence = _block_influence(decoder, text)
    found = {
        "influence": tuple(influence[unit.layer] for unit in units),
        "lost_score": tuple(_lost_score(importance[u.layer], p, u) for u, p in zip(units, plans, strict=True)),
        "weight": tuple(_mean_size(decoder.layers[unit.layer], unit) for unit in units),
    }
    errors = [ordered.fit_error(unit.layer, plan) for unit, plan in zip(units, plans, strict=True)]
    if None not in errors:
        found["fit_error"] = tuple(error for error in errors if error is not None)
    return found


def _block_influence(decoder: Decoder, text: Tensor) -> list[float]:
    """Return 1 − the mean cosine of each layer's input and output over tokens (Men et al., 2024, equation 1)."""
    windows = beginnings(text)
    found = []
    with torch.inference_mode(), whole_windows(decoder):
        hidden = decoder.embedding(windows.to(decoder.device))
        calls, _ = record_calls(decoder, windows, keep_hidden=False)
        for layer, call in zip(decoder.layers, calls, strict=True):
            after = layer.module(hidden, **call.options)
            cosine = torch.cosine_similarity(hidden.float(), after.to(hidden.device).float(), dim=-1)
            found.append(1 - cosine.mean().item())
            hidden = after
    return found


def _lost_score(importance: LayerImportance, plan: LayerPlan, unit: Unit) -> float:
    """Return the share of the unit's importance scores that `plan` removes; for a layer, the mean of both blocks."""
    shares = {
        "attention": 1 - _kept_heads(importance, plan) / _total(importance.query_heads),
        "mlp": 1 - _total(importance.channels.topk(plan.mlp_channels).values) / _total(importance.channels),
    }
    return sum(shares.values()) / 2 if unit.kind == "layer" else shares[unit.kind]


def _kept_heads(importance: LayerImportance, plan: LayerPlan) -> float:
    groups = importance.query_heads[importance.kv_heads.topk(plan.kv_heads).indices]
    return _total(groups.topk(plan.queries_per_kv, dim=1).values)


def _total(scores: Tensor) -> float:
    return max(scores.double().sum().item(), 1e-30)


def _mean_size(layer: Layer, unit: Unit) -> float:
    """Return mean |W| over the unit's projections."""
    weights = list(_weights(layer, unit))
    chunks = (rows.float().abs() for weight in weights for rows in torch.split(weight, ROWS_PER_CHUNK))
    return sum(rows.sum(dtype=torch.float64).item() for rows in chunks) / sum(weight.numel() for weight in weights)


def _weights(layer: Layer, unit: Unit) -> Iterator[Tensor]:
    if unit.kind != "mlp":
        yield from (linear.weight for linear in (layer.query, layer.key, layer.value, layer.output))
    if unit.kind != "attention":
        yield from (linear.weight for linear in (layer.gate, layer.up, layer.down))
