"""The naive way to measure a plan, as the papers' scripts do: copy the model, calibrate, prune, take the whole loss."""

import copy
import math

import torch
from torch import Tensor

from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.calibration import calibrate
from gpu_worker.pruning.importance import wanda_sp
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import Plan


def naive_perplexity(model: LoadedModel, plan: Plan, calibration: Tensor, windows: Tensor) -> float:
    """Return the perplexity of `windows` (long, [n, seqlen]) with `plan`. `model` must be dense, and stays so."""
    pruned, decoder = copy.deepcopy((model.causal_lm, model.decoder))
    layers = zip(decoder.layers, calibrate(decoder, calibration), decoder.shape.layers, strict=True)
    OrderedModel(decoder, [wanda_sp(layer, seen, shape) for layer, seen, shape in layers]).apply(plan)
    with torch.inference_mode():
        each = windows.to(decoder.device)[:, None]
        losses = [pruned(input_ids=window, labels=window, use_cache=False).loss.item() for window in each]
    return math.exp(math.fsum(losses) / len(losses))
