"""What a search needs, found without loading any weights: the model's sizes, its texts, its memory."""

import torch

from gpu_worker.evaluation.texts import count_windows, too_long
from gpu_worker.models.families import Decoder
from gpu_worker.models.loading import LoadedModel, load_without_weights
from gpu_worker.models.machine import Machine, main_memory, this_machine
from gpu_worker.models.memory import Workload, estimate_memory, generation_batch_size
from gpu_worker.models.placement import place
from gpu_worker.models.published import published_decoder
from protocol.errors import DataError, ModelError
from protocol.plans.spec import Role, SearchSpec
from protocol.results.needs import DeviceSpeed, Needs


def find_needs(spec: SearchSpec, gpu: DeviceSpeed | None = None, gpus: int = 1) -> Needs:
    """Return what a search with this spec needs on this machine, or on `gpus` GPUs like `gpu`."""
    model: LoadedModel | None = None
    error: str | None = None
    try:
        model = load_without_weights(spec.model, spec.dtype)
    except ModelError as raised:
        error = str(raised)
    if model is not None:
        decoder, longest = model.decoder, model.longest_positions
    elif published := published_decoder(spec.model, spec.dtype):
        decoder, longest = published
    else:
        return Needs(model_error=error)
    machine = this_machine() if gpu is None else Machine((gpu.memory,) * gpus, main_memory())
    windows, texts_error = _windows(spec, model, longest)
    size = getattr(torch, spec.dtype).itemsize
    needs = {
        "shape": decoder.shape,
        "head_parameters": decoder.head.weight.numel(),
        "longest": longest,
        "model_error": error,
        "windows": windows,
        "texts_error": texts_error,
        "weight_bytes": decoder.shape.total_parameters * size,
        "texts_together": generation_batch_size(decoder.shape, size, spec.fitness.seqlen),
    }
    return Needs(**needs, **_memory(spec, decoder, machine))


def _memory(spec: SearchSpec, decoder: Decoder, machine: Machine) -> dict[str, object]:
    estimate = estimate_memory(decoder, getattr(torch, spec.dtype), Workload.of(spec), machine.device)
    said: dict[str, object] = {"memory": f"{estimate.description}; {machine.description}"}
    try:
        placement = place(estimate, machine)
    except ModelError as error:
        return said | {"memory_error": str(error)}
    if placement.fit_in_main_memory and estimate.with_fit_in_main_memory is not None:
        said["memory"] = f"{estimate.with_fit_in_main_memory.description}; {machine.description}"
    return said | {"gpus": len(placement.budget) or int(machine.device == "cuda")}


def _windows(spec: SearchSpec, model: LoadedModel | None, longest: int | None) -> tuple[dict[Role, int], str | None]:
    """Return the number of windows of each text, and why they cannot be had."""
    seqlen = max(text.seqlen for text in spec.texts.values())
    if model is None:  # only the model's config can be read
        return {}, None if longest is None or seqlen <= longest else too_long(seqlen, longest)
    try:
        return count_windows(model, spec.texts, spec.seed), None
    except DataError as error:
        return {}, str(error)
