"""The expected output of a pruned model, computed by masking the removed pieces of the dense model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.models.families import Layer
from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.calibration import calibrate
from gpu_worker.pruning.importance import LayerImportance, wanda_sp
from protocol.plans.plan import LayerPlan, Plan
from tests.support.tiny_models import tiny_windows


def scores_of(model: LoadedModel) -> list[LayerImportance]:
    """Wanda-sp scores on a few random tokens."""
    decoder = model.decoder
    seen = calibrate(decoder, tiny_windows(3, 16, seed=1))
    return [wanda_sp(*each) for each in zip(decoder.layers, seen, decoder.shape.layers, strict=True)]


def logits_of(model: LoadedModel) -> Tensor:
    """Return the logits on two fixed texts."""
    logits: Tensor = model.causal_lm(input_ids=tiny_windows(2, 24)).logits
    return logits


def keep(*layers: tuple[int, int, int]) -> Plan:
    """The plan of KV heads, query heads per KV head and channels kept in each layer."""
    return Plan(layers=tuple(LayerPlan(kv_heads=k, queries_per_kv=q, mlp_channels=c) for k, q, c in layers))


def mask(layer: Layer, kept: LayerPlan, scores: LayerImportance, head_dim: int) -> None:
    """Zero the columns of o and down that belong to removed heads and channels."""
    heads = torch.zeros(scores.query_heads.shape)
    for kv in scores.kv_heads.argsort(descending=True)[: kept.kv_heads]:
        heads[kv, scores.query_heads[kv].argsort(descending=True)[: kept.queries_per_kv]] = 1
    channels = torch.zeros(scores.channels.shape)
    channels[scores.channels.argsort(descending=True)[: kept.mlp_channels]] = 1
    layer.output.weight.mul_(heads.flatten().repeat_interleave(head_dim))
    layer.down.weight.mul_(channels)


def masked_logits(model: LoadedModel, plan: Plan, importance: Sequence[LayerImportance]) -> Tensor:
    """Return the expected logits of `plan`, by masking the dense `model` in place."""
    for layer, kept, scores in zip(model.decoder.layers, plan.layers, importance, strict=True):
        mask(layer, kept, scores, model.decoder.shape.head_dim)
    return logits_of(model)
