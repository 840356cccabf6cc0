"""Decides where a model goes: one GPU, several GPUs or the CPU. A model that fits nowhere is refused before loading.

Weights are never offloaded to CPU or disk. Pruning reads and reorders every weight, and an offloaded weight has no
permanent place on the device to be reordered in. A search runs the model hundreds of times, and offloading would make
each run far too slow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import accelerate
import torch
import transformers

from gpu_worker.models.machine import Machine, gigabytes
from gpu_worker.models.memory import MemoryEstimate
from protocol.errors import ModelError

MARGIN = 0.04
"""Share of a GPU's free memory that is left free."""
ADVICE = "use shorter windows (seqlen), a smaller dtype, more or larger GPUs, or a smaller model"


@dataclass(frozen=True)
class Placement:
    """One device for the whole model, or the bytes of weights that each GPU may hold."""

    device: str | None = None
    """`cpu` or `cuda:N`; None if the model is spread over several GPUs."""
    budget: Mapping[int, int] = field(default_factory=dict)
    fit_in_main_memory: bool = False
    """Whether the matrices of the fit are kept in main memory."""


def place(estimate: MemoryEstimate, machine: Machine) -> Placement:
    """Return where a model with this estimate goes on this machine.

    The order is: the GPU with the most free memory, all GPUs together, and the CPU if there is no GPU. GPUs are first
    tried with memory for the copies of any plan, then for fitted weights only. In the second case, plans that need too
    many copies fail as out of memory. At last, the matrices of the fit are kept in main memory. MARGIN of each GPU's
    free memory stays free, for what torch and its libraries take. Raises ModelError if the model fits nowhere.
    """
    if not machine.gpus:
        if estimate.minimum + estimate.main_memory > machine.main_memory:
            raise too_large(estimate, machine)
        return Placement("cpu")
    if estimate.main_memory > machine.main_memory:
        raise ModelError(
            f"the texts need about {gigabytes(estimate.main_memory)} of main memory where "
            f"{gigabytes(machine.main_memory)} are available; use fewer or shorter windows (data)"
        )
    gpus = [int(free * (1 - MARGIN)) for free in machine.gpus]
    for copies in (max(0, estimate.pruned_copies - estimate.fitted_copies), 0):
        placement = _on_gpus(estimate, gpus, copies)
        if placement is not None:
            return placement
    streamed = estimate.with_fit_in_main_memory
    if streamed is None:
        raise too_large(estimate, machine)
    placement = _on_gpus(streamed, gpus, 0)
    if placement is None:
        raise too_large(streamed, machine)
    if streamed.main_memory > machine.main_memory:
        raise ModelError(
            f"the matrices of the fit have no room on the GPU, and in main memory they need about "
            f"{gigabytes(streamed.main_memory)} where {gigabytes(machine.main_memory)} are available; "
            f"use sequential scoring (of wanda-sp), for which the fit needs far less, or no reconstruction"
        )
    return replace(placement, fit_in_main_memory=True)


def _on_gpus(estimate: MemoryEstimate, gpus: Sequence[int], copies: int) -> Placement | None:
    """Place the model on one of `gpus` (their bytes) or on all, with `copies` bytes beside the weights.

    Returns None if it does not fit.
    """
    largest = max(range(len(gpus)), key=lambda i: gpus[i])
    if estimate.minimum + copies <= gpus[largest]:
        return Placement(f"cuda:{largest}")
    # Reconstruction and fine-tuning keep their data on the device of each layer.
    share = estimate.weights / (estimate.minimum - estimate.activations + copies)
    budget = {i: int((free - estimate.activations) * share) for i, free in enumerate(gpus)}
    useful = {i: weights for i, weights in budget.items() if weights > 0}
    return Placement(budget=useful) if len(useful) > 1 and sum(useful.values()) >= estimate.weights else None


def too_large(estimate: MemoryEstimate, machine: Machine) -> ModelError:
    """Return the error for a model that fits nowhere."""
    advice = f"{ADVICE}, or no reconstruction" if estimate.reconstruction else ADVICE
    if estimate.training_state:
        advice += ", a smaller micro-batch, or LoRA if it is not"
    which = "the model is too large for this machine: it needs"
    if estimate.models > 1:
        which = f"the {estimate.models} models together are too large for this machine: they need"
    return ModelError(f"{which} {estimate.description}; {machine.description}; {advice}")


def share_of(placement: Placement, weights: int, all_weights: int) -> Placement:
    """Return the placement of one of several models placed together: its share of each GPU's budget."""
    budget = {gpu: room * weights // all_weights for gpu, room in placement.budget.items()}
    return replace(placement, budget=budget)


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """Build the model of a config on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def device_map(model: Any, layer: type, placement: Placement) -> dict[str, str | int] | None:
    """Return the device of each module of `model` (on the meta device); None for the CPU.

    Decoder layers (class `layer`) are never split. A model that is spread takes the fewest GPUs that can hold it, as
    evenly as they can, so that other workers can take the rest. Raises ModelError if the model fits the GPUs' total
    memory, but its layers cannot be distributed over the GPUs without splitting one.
    """
    if placement.device is not None:
        return None if placement.device == "cpu" else {"": placement.device}
    sizes = accelerate.utils.compute_module_sizes(model)
    largest = max(sizes[name] for name, module in model.named_modules() if isinstance(module, layer))
    by_room = sorted(placement.budget, key=lambda gpu: placement.budget[gpu], reverse=True)
    for count in range(2, len(by_room) + 1):
        used = sorted(by_room[:count])
        if sum(placement.budget[gpu] for gpu in used) < sizes[""]:
            continue
        for limit in range(sizes[""] // count, sizes[""] + largest, largest):
            budget = {gpu: min(placement.budget[gpu], limit) for gpu in used}
            found: dict[str, str | int] = accelerate.infer_auto_device_map(
                model, max_memory=budget, no_split_module_classes=[layer.__name__]
            )
            if set(found.values()) <= set(budget):
                return found
    raise ModelError(f"the model's layers cannot be distributed over the {len(placement.budget)} GPUs; {ADVICE}")
