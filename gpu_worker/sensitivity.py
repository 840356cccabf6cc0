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
from protocol.alone import pruned_alone
from protocol.plan import LayerPlan, dense_plan
from protocol.shape import Unit
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
    shape = ordered.decoder.shape
    with torch.inference_mode():
        run = _DenseRun.of(ordered.decoder, text[:WINDOWS, : max(2, TOKENS // WINDOWS)])
        units = steps(progress, "measuring sensitivity", shape.units(spec.granularity))
        return tuple(_rise(ordered, run, unit, pruned_alone(unit, spec, shape)) for unit in units)


def _rise(ordered: OrderedModel, run: "_DenseRun", unit: Unit, plan: LayerPlan) -> float:
    ordered.apply_layer(unit.layer, plan)
    loss = run.loss_from(unit.layer)
    ordered.apply_layer(unit.layer, dense_plan(ordered.decoder.shape).layers[unit.layer])
    return (loss if math.isfinite(loss) else math.log(ordered.decoder.head.out_features)) - run.loss


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
