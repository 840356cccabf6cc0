"""How much each unit matters: the rise of log-perplexity when it alone is pruned."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.families import Decoder
from gpu_worker.layerwise import LayerCall, record_calls
from gpu_worker.perplexity import NotFiniteError, hidden_loss
from gpu_worker.progress import Progress, no_progress, steps
from gpu_worker.pruning import OrderedModel
from protocol.plan import LayerPlan, Plan, dense_plan, head_options, heads_within, make_plan
from protocol.shape import ModelShape, Unit
from protocol.spec import SearchSpec

WINDOWS = 2
TOKENS = 1024
"""Windows, and tokens in all of them, that are looked at: the figures rank units, nobody reports them."""


def measure_sensitivity(
    ordered: OrderedModel, spec: SearchSpec, text: Tensor, progress: Progress = no_progress
) -> tuple[float, ...]:
    """Per unit of the spec's granularity, the rise of log-perplexity when it alone loses the spec's rate.

    Measured on the beginnings of the first two windows of `text` (long, [n, seqlen]). Layers below the pruned one
    compute what they do in the dense model, so their output is kept and only the rest is run. The model is dense
    before and after. Raises NotFiniteError where the dense model is broken; a unit that breaks the model when pruned
    gets the loss of a uniform guess, the worst that the log-perplexity of a working model can be.
    """
    ordered.restore()
    decoder = ordered.decoder
    units = decoder.shape.units(spec.granularity)
    whole = dense_plan(decoder.shape).layers
    rises = []
    with torch.inference_mode():
        run = _DenseRun.of(decoder, text[:WINDOWS, : max(2, TOKENS // WINDOWS)])
        for unit in steps(progress, "measuring sensitivity", units):
            ordered.apply_layer(unit.layer, pruned_alone(unit, spec, decoder.shape))
            loss = run.loss_from(unit.layer)
            rises.append((loss if math.isfinite(loss) else math.log(decoder.head.out_features)) - run.loss)
            ordered.apply_layer(unit.layer, whole[unit.layer])
    return tuple(rises)


def pruned_alone(unit: Unit, spec: SearchSpec, shape: ModelShape) -> LayerPlan:
    """What the unit's layer keeps when this unit alone loses the spec's rate, or as much as leaves it working.

    A layer is pruned with the spec's split; an MLP loses the rate's share of its channels; attention takes the
    rectangular shape that the rate allows, and loses at least its smallest removable piece: at a low rate that shape
    would be the whole block, and a sensitivity of zero would say that it may be pruned for nothing.
    """
    rate = min(spec.rate, unit.highest_rate)
    whole = dense_plan(shape).layers[unit.layer]
    if unit.kind == "layer":
        rates = [rate if i == unit.layer else 0.0 for i in range(len(shape.layers))]
        kept = make_plan(rates, shape, split=spec.split, multiple_of=spec.multiple_of).layers[unit.layer]
        return kept if kept != whole else _fewer_channels(whole, spec.multiple_of)
    if unit.kind == "mlp":
        return _fewer_channels(whole, max(1, round(rate * whole.mlp_channels)))
    kv, each = heads_within(shape.layers[unit.layer], rate)
    if kv * each == whole.query_heads:
        kv, each = _smallest_removal(shape, unit)
    return whole.model_copy(update={"kv_heads": kv, "queries_per_kv": each})


def _fewer_channels(whole: LayerPlan, count: int) -> LayerPlan:
    """The layer without `count` channels, or with the one that has to stay."""
    return whole.model_copy(update={"mlp_channels": max(1, whole.mlp_channels - count)})


def removed_alone(unit: Unit, spec: SearchSpec, shape: ModelShape) -> float:
    """The share of the unit's parameters that `pruned_alone` removes."""
    whole, kept = dense_plan(shape), pruned_alone(unit, spec, shape)
    layers = [kept if i == unit.layer else layer for i, layer in enumerate(whole.layers)]
    left = Plan(layers=tuple(layers)).decoder_parameters(shape)
    return (shape.decoder_parameters - left) / unit.parameters


def _smallest_removal(shape: ModelShape, unit: Unit) -> tuple[int, int]:
    """The attention shape that loses least; the whole one where there is but one head."""
    *smaller, whole = sorted(
        head_options(shape.layers[unit.layer]),
        key=lambda heads: (shape.attention_parameters(heads[0] * heads[1], heads[0]), heads[0]),
    )
    return smaller[-1] if smaller else whole


@dataclass(frozen=True)
class _DenseRun:
    """One pass of the dense model over `windows` (long, [n, seqlen]), kept so that it can be taken up at any layer."""

    decoder: Decoder
    windows: Tensor
    calls: tuple[LayerCall, ...]
    loss: float
    """Mean negative log-likelihood."""

    @classmethod
    def of(cls, decoder: Decoder, windows: Tensor) -> "_DenseRun":
        """Run the dense model. Raises NotFiniteError where its loss is no number."""
        calls, hidden = record_calls(decoder, windows)
        loss = _mean_loss(decoder, hidden, windows)
        if not math.isfinite(loss):
            raise NotFiniteError(f"the mean loss of the dense model is {loss}")
        return cls(decoder, windows, calls, loss)

    def loss_from(self, layer: int) -> float:
        """Mean negative log-likelihood when decoder layers `layer` and above, as they are now, are run again."""
        hidden = self.calls[layer].hidden
        for above in range(layer, len(self.calls)):
            hidden = self.decoder.layers[above].module(hidden, **self.calls[above].options)
        return _mean_loss(self.decoder, self.decoder.norm(hidden), self.windows)


def _mean_loss(decoder: Decoder, hidden: Tensor, windows: Tensor) -> float:
    return hidden_loss(decoder, hidden, windows) / (windows.shape[0] * (windows.shape[1] - 1))
