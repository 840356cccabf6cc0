"""Sensitivity of each unit: the KL divergence from the dense model when only this unit is pruned.

Perplexity is too noisy for this. Over a few hundred tokens, pruning a single unit usually changes perplexity by less
than the noise, and half of the units seem harmless. The divergence compares whole distributions. It varies from window
to window more than within a window, so it is measured on the beginnings of many windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.measuring.divergence import DensePredictions, divergence_from, predictions_from
from gpu_worker.models.attention import whole_windows
from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import SENSITIVITY_WINDOWS
from gpu_worker.progress import Progress, no_progress, steps
from gpu_worker.pruning.layerwise import LayerCall, record_calls
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import LayerPlan, dense_plan
from protocol.plans.shape import Unit
from protocol.plans.single_unit_pruning import single_unit_plan
from protocol.plans.spec import SearchSpec
from protocol.results.needs import SENSITIVITY_TOKENS


def measure_sensitivity(
    ordered: OrderedModel, spec: SearchSpec, text: Tensor, progress: Progress = no_progress
) -> tuple[float, ...]:
    """Return KL(dense ‖ pruned) of each unit in nats per token, pruned alone by the spec's rate; see `measure_harm`."""
    shape = ordered.decoder.shape
    pruned = [(unit, single_unit_plan(unit, spec, shape)) for unit in shape.units(spec.granularity)]
    return tuple(measure_harm(ordered, pruned, text, progress, "measuring sensitivity"))


def measure_harm(
    ordered: OrderedModel, pruned: Sequence[tuple[Unit, LayerPlan]], text: Tensor, progress: Progress, stage: str
) -> list[float]:
    """Return KL(dense ‖ pruned) in nats per token for each of some layer plans, each alone in the dense model.

    Measured on `beginnings` of `text` (long, [n, seqlen]). If the head is large beside the decoder layers, predictions
    are compared at every second token, or fewer (`_stride`). The dense outputs of the layers below the pruned layer are
    reused; only the pruned layer and the layers above it are run. The model is made dense before, and is dense
    afterwards. Raises NotFiniteError if the dense model is broken. A plan that breaks the model gets log(vocabulary
    size), the largest possible divergence of a uniform prediction.
    """
    ordered.restore()
    with torch.inference_mode(), whole_windows(ordered.decoder):
        run = _DenseRun.of(ordered.decoder, beginnings(text))
        return [_harm(ordered, run, unit, plan) for unit, plan in steps(progress, stage, pruned)]


def beginnings(text: Tensor) -> Tensor:
    """Return the first tokens of windows of `text` (long, [n, seqlen]): SENSITIVITY_TOKENS in all, if there are enough.

    At most SENSITIVITY_WINDOWS windows are used. Of fewer windows, longer beginnings are used.
    """
    windows = text[:SENSITIVITY_WINDOWS]
    return windows[:, : max(2, SENSITIVITY_TOKENS // len(windows))]


def _harm(ordered: OrderedModel, run: "_DenseRun", unit: Unit, plan: LayerPlan) -> float:
    ordered.apply_layer(unit.layer, plan)
    found = run.divergence_from(unit.layer)
    ordered.apply_layer(unit.layer, dense_plan(ordered.decoder.shape).layers[unit.layer])
    return found if math.isfinite(found) else math.log(ordered.decoder.head.out_features)


@dataclass(frozen=True)
class _DenseRun:
    """A pass of the dense model over `windows` (long, [n, seqlen]) that can be resumed at any layer."""

    decoder: Decoder
    windows: Tensor
    calls: tuple[LayerCall, ...]
    stride: int
    predictions: DensePredictions
    """The predictions at every `stride`-th token."""

    @classmethod
    def of(cls, decoder: Decoder, windows: Tensor) -> "_DenseRun":
        """Run the dense model. Raises NotFiniteError if its predictions are not finite."""
        calls, hidden = record_calls(decoder, windows)
        stride = min(_stride(decoder), max(1, windows.shape[1] // 2))  # at least one prediction per window
        predictions = predictions_from(decoder, hidden[:, ::stride], windows[:, ::stride])
        return cls(decoder, windows, calls, stride, predictions)

    def divergence_from(self, layer: int) -> float:
        """Run decoder layers from `layer` on, and return the divergence from the dense model in nats per token."""
        hidden = self.calls[layer].hidden
        for above in range(layer, len(self.calls)):
            hidden = self.decoder.layers[above].module(hidden, **self.calls[above].options)
        hidden, windows = self.decoder.norm(hidden)[:, :: self.stride], self.windows[:, :: self.stride]
        return divergence_from(self.decoder, hidden, windows, self.predictions)


def _stride(decoder: Decoder) -> int:
    """Return at which tokens predictions are compared: at most half of the work of a pass is done in the head.

    In Gemma 3 270M, the head for 262,000 tokens has more parameters than all decoder layers.
    """
    return max(1, round(2 * decoder.head.weight.numel() / decoder.shape.decoder_parameters))
