"""Where a model goes: one GPU, several, or the CPU; refused in one sentence before loading where it fits nowhere.

Neither the CPU nor the disk ever holds what the GPUs have no room for: pruning reads and reorders every weight, and a
weight that is fetched for each use has no place of its own to be reordered in. A search needs the model hundreds of
times; fetched each time, it would not end.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import accelerate
import torch
import transformers

from gpu_worker.models.memory import Machine, MemoryEstimate
from protocol.errors import ModelError
from protocol.runtime.amounts import gigabytes

ADVICE = "use shorter windows (seqlen), a smaller dtype, more or larger GPUs, or a smaller model"


@dataclass(frozen=True)
class Placement:
    """One device for the whole model, or how many bytes of weights each GPU may hold."""

    device: str | None = None
    """`cpu` or `cuda:N`; None where the model is spread."""
    budget: Mapping[int, int] = field(default_factory=dict)


def place(estimate: MemoryEstimate, machine: Machine) -> Placement:
    """Where a model of this size goes on this machine.

    The GPU with most free memory if the model fits there; all GPUs together if not; the CPU where there is no GPU.
    First with room for every plan, then without: plans that need more have failed as out of memory.
    Raises ModelError where it fits nowhere.
    """
    if not machine.gpus:
        if estimate.minimum + estimate.main_memory > machine.main_memory:
            raise too_large(estimate, machine)
        return Placement("cpu")
    if estimate.main_memory > machine.main_memory:
        raise ModelError(
            f"the texts need about {gigabytes(estimate.main_memory)} of main memory where {gigabytes(machine.main_memory)} are "
            "available; use fewer or shorter windows (data)"
        )
    for copies in (estimate.pruned_copies, 0):
        placement = _on_gpus(estimate, machine, copies)
        if placement is not None:
            return placement
    raise too_large(estimate, machine)


def _on_gpus(estimate: MemoryEstimate, machine: Machine, copies: int) -> Placement | None:
    """On one GPU or on all, with room for `copies` bytes beside the weights; None where there is none."""
    largest = max(range(len(machine.gpus)), key=lambda i: machine.gpus[i])
    if estimate.minimum + copies <= machine.gpus[largest]:
        return Placement(f"cuda:{largest}")
    # What reconstruction and fine-tuning keep of a layer is on its device.
    share = estimate.weights / (estimate.weights + estimate.reconstruction + estimate.training_state + copies)
    budget = {i: int((free - estimate.activations) * share) for i, free in enumerate(machine.gpus)}
    useful = {i: weights for i, weights in budget.items() if weights > 0}
    return Placement(budget=useful) if len(useful) > 1 and sum(useful.values()) >= estimate.weights else None


def too_large(estimate: MemoryEstimate, machine: Machine) -> ModelError:
    """What is said of a model that fits nowhere."""
    advice = f"{ADVICE}, or no reconstruction" if estimate.reconstruction else ADVICE
    if estimate.training_state:
        advice += ", a smaller micro-batch, or LoRA if it is not"
    which = "the model is too large for this machine: it needs"
    if estimate.models > 1:
        which = f"the {estimate.models} models together are too large for this machine: they need"
    return ModelError(f"{which} {estimate.description}; {machine.description}; {advice}")


def share_of(placement: Placement, weights: int, all_weights: int) -> Placement:
    """Where one of several models goes that were placed together: its share of every GPU's budget."""
    budget = {gpu: room * weights // all_weights for gpu, room in placement.budget.items()}
    return Placement(placement.device, budget)


def meta_model(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The model of a config without memory for its weights: on the meta device."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def device_map(model: Any, layer: type, placement: Placement) -> dict[str, str | int] | None:
    """Which device gets which module of `model` (on the meta device); None for the CPU alone.

    Modules of the class `layer`, the decoder layers, are never split. Raises ModelError where the GPUs' budgets add up
    to the model, but not to whole layers.
    """
    if placement.device is not None:
        return None if placement.device == "cpu" else {"": placement.device}
    found: dict[str, str | int] = accelerate.infer_auto_device_map(
        model, max_memory=dict(placement.budget), no_split_module_classes=[layer.__name__]
    )
    if not set(found.values()) <= set(placement.budget):
        raise ModelError(f"the model's layers do not fit on the {len(placement.budget)} GPUs one by one; {ADVICE}")
    return found
