"""How much each unit matters: the divergence from the dense model when it alone is pruned.

Not the rise of perplexity: pruned alone, most units change it by less than what a few hundred tokens swing by, up or
down, and half of them come out as harmless. What the dense model predicts is a whole distribution for every token, and
how far the pruned one is from it is told by the same few tokens to a few percent.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.measuring.divergence import DensePredictions, divergence_from, predictions_from
from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import SENSITIVITY_TOKENS, SENSITIVITY_WINDOWS
from gpu_worker.progress import Progress, no_progress, steps
from gpu_worker.pruning.layerwise import LayerCall, record_calls
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import LayerPlan, dense_plan
from protocol.plans.shape import Unit
from protocol.plans.single_unit_pruning import single_unit_plan
from protocol.plans.spec import SearchSpec


def measure_sensitivity(
    ordered: OrderedModel, spec: SearchSpec, text: Tensor, progress: Progress = no_progress
) -> tuple[float, ...]:
    """Per unit of the spec's granularity, KL(dense ‖ pruned) in nats a token when it alone loses the spec's rate.

    Measured on the beginnings of the first `SENSITIVITY_WINDOWS` windows of `text` (long, [n, seqlen]). Layers below
    the pruned one compute what they do in the dense model, so their output is kept and only the rest is run. The model
    is dense before and after. Raises NotFiniteError where the dense model is broken; a unit whose pruning breaks it
    gets the most that a uniform guess can be away from it, the logarithm of the size of the vocabulary.
    """
    ordered.restore()
    shape = ordered.decoder.shape
    with torch.inference_mode():
        run = _DenseRun.of(
            ordered.decoder, text[:SENSITIVITY_WINDOWS, : max(2, SENSITIVITY_TOKENS // SENSITIVITY_WINDOWS)]
        )
        units = steps(progress, "measuring sensitivity", shape.units(spec.granularity))
        return tuple(_harm(ordered, run, unit, single_unit_plan(unit, spec, shape)) for unit in units)


def _harm(ordered: OrderedModel, run: "_DenseRun", unit: Unit, plan: LayerPlan) -> float:
    ordered.apply_layer(unit.layer, plan)
    found = run.divergence_from(unit.layer)
    ordered.apply_layer(unit.layer, dense_plan(ordered.decoder.shape).layers[unit.layer])
    return found if math.isfinite(found) else math.log(ordered.decoder.head.out_features)


@dataclass(frozen=True)
class _DenseRun:
    """One pass of the dense model over `windows` (long, [n, seqlen]), kept so that it can be taken up at any layer."""

    decoder: Decoder
    windows: Tensor
    calls: tuple[LayerCall, ...]
    predictions: DensePredictions

    @classmethod
    def of(cls, decoder: Decoder, windows: Tensor) -> "_DenseRun":
        """Run the dense model. Raises NotFiniteError where it predicts no numbers."""
        calls, hidden = record_calls(decoder, windows)
        return cls(decoder, windows, calls, predictions_from(decoder, hidden, windows))

    def divergence_from(self, layer: int) -> float:
        """From the dense model, in nats a token, when decoder layers `layer` and above, as they are, are run again."""
        hidden = self.calls[layer].hidden
        for above in range(layer, len(self.calls)):
            hidden = self.decoder.layers[above].module(hidden, **self.calls[above].options)
        return divergence_from(self.decoder, self.decoder.norm(hidden), self.windows, self.predictions)
