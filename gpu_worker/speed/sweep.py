"""MLP widths rounded to one multiple after the other: kernels are made for round widths, and a plan's are odd."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from gpu_worker.families import Layer
from gpu_worker.progress import Progress
from gpu_worker.pruning import set_linear
from gpu_worker.speed.engines import SpeedRequest
from gpu_worker.speed.measuring import Pair, Runner, measured_batches, prefixed
from gpu_worker.speed.transformers_engine import TransformersRunner
from protocol.errors import SettingsError
from protocol.plan import LayerPlan, Plan, dense_plan
from protocol.shape import ModelShape
from protocol.speeds import SweptWidths


def plans_of(pair: Pair, multiples: Sequence[int]) -> dict[int, Plan]:
    """The plan of the pruned model for each multiple. Raises SettingsError for one wider than a dense MLP."""
    if not multiples:
        return {}
    dense, pruned = (_in_transformers(runner).model.decoder.shape for runner in (pair.dense, pair.pruned))
    return {multiple: rounded(pruned, dense, multiple) for multiple in multiples}


def sweep(pair: Pair, plans: Mapping[int, Plan], request: SpeedRequest, progress: Progress) -> Iterator[SweptWidths]:
    """Measure the pruned model with its MLPs as wide as each of `plans` wants them, and leave it so.

    Weights are the dense model's first channels: which ones they are makes no difference to the speed.
    """
    for multiple, plan in plans.items():
        dense, pruned = (_in_transformers(runner).model.decoder for runner in (pair.dense, pair.pruned))
        for source, layer, sizes in zip(dense.layers, pruned.layers, plan.layers, strict=True):
            widen(layer, source, sizes.mlp_channels)
        told = prefixed(progress, f"multiples of {multiple}")
        batches = measured_batches(pair, request.batch_sizes, request.repeats, request.warm_up, told)
        yield SweptWidths(
            multiple_of=multiple, decoder_parameters=plan.decoder_parameters(dense.shape), batches=batches
        )


def _in_transformers(runner: Runner) -> TransformersRunner:
    assert isinstance(runner, TransformersRunner), "only there can widths be changed in memory"
    return runner


def rounded(kept: ModelShape, whole: ModelShape, multiple: int) -> Plan:
    """The plan of a pruned model, each MLP width the nearest multiple that is one at least and no wider than dense.

    Raises SettingsError where a dense MLP has not so many channels.
    """
    return Plan(
        layers=tuple(
            LayerPlan(
                kv_heads=plan.kv_heads,
                queries_per_kv=plan.queries_per_kv,
                mlp_channels=nearest(plan.mlp_channels, multiple, dense.mlp_channels),
            )
            for plan, dense in zip(dense_plan(kept).layers, whole.layers, strict=True)
        )
    )


def nearest(width: int, multiple: int, most: int) -> int:
    """The multiple nearest to `width`, of two the larger one, from one `multiple` to `most`."""
    if multiple > most:
        raise SettingsError(f"MLP widths cannot be multiples of {multiple}: a dense MLP has {most} channels")
    return min(max(1, (2 * width + multiple) // (2 * multiple)), most // multiple) * multiple


def widen(layer: Layer, source: Layer, channels: int) -> None:
    """Give the MLP of `layer` the first `channels` of that of `source`, laid out as a file's are."""
    # Of models that are spread, two layers of one number may lie on two GPUs.
    device = layer.gate.weight.device
    with torch.no_grad():
        for to, of in ((layer.gate, source.gate), (layer.up, source.up)):
            bias = None if of.bias is None else of.bias[:channels].clone().to(device)
            set_linear(to, of.weight[:channels].clone().to(device), bias)
        bias = None if source.down.bias is None else source.down.bias.to(device)
        set_linear(layer.down, source.down.weight[:, :channels].contiguous().to(device), bias)
