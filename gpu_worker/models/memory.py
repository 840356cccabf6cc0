"""Estimates the memory that a model needs, from its config alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import (
    GRADIENT_SAMPLES,
    GRADIENT_TOKENS,
    KL_TOP_K,
    LOGITS_CHUNK_BYTES,
    ROWS_PER_CHUNK,
)
from gpu_worker.models.machine import gigabytes
from protocol.plans.shape import LayerShape, ModelShape
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.results.finetuning import Recipe
from protocol.results.needs import SENSITIVITY_TOKENS

FP32 = INT32 = 4
BYTES_PER_TRAINED_PARAMETER = 4 * FP32
"""The fp32 master copy, its gradient, and AdamW's two moments."""


@dataclass(frozen=True)
class Training:
    """Memory that fine-tuning with a recipe needs."""

    recipe: Recipe
    teacher_bytes: int = 0
    """Bytes of the weights of the model whose predictions are learnt. It runs before the activations are there."""

    @property
    def tokens(self) -> int:
        """Return the number of tokens in a micro-batch."""
        return self.recipe.micro_batch * self.recipe.seqlen

    def parameters(self, shape: ModelShape) -> int:
        """Return the approximate number of trained parameters in a model of this shape, biases and norms included."""
        if self.recipe.method == "full":
            return shape.decoder_parameters
        return self.recipe.rank * sum(inputs + outputs for inputs, outputs in _projections(shape))

    def resident_bytes(self, shape: ModelShape, size: int) -> int:
        """Return the bytes kept during training in addition to the weights, for a dtype of `size` bytes."""
        each = BYTES_PER_TRAINED_PARAMETER + (size if self.recipe.method == "lora" else 0)
        return self.teacher_bytes + self.parameters(shape) * each

    def activation_bytes(self, shape: ModelShape, size: int) -> int:
        """Return the bytes of activations that all layers keep for the backward pass, without logits."""
        attention = 3 * shape.head_dim * sum(layer.query_heads + 2 * layer.kv_heads for layer in shape.layers)
        mlp = 4 * sum(layer.mlp_channels for layer in shape.layers)
        stream = len(shape.layers) * shape.hidden_size * (6 * size + 2 * FP32)
        # LoRA keeps each projection's input after dropout, and the dropout mask.
        dropped = (size + 1) * sum(inputs for inputs, _ in _projections(shape)) if self.recipe.method == "lora" else 0
        return self.tokens * ((attention + mlp) * size + stream + dropped)


def _projections(shape: ModelShape) -> list[tuple[int, int]]:
    """Return the numbers of inputs and outputs of each projection."""
    found = []
    for layer in shape.layers:
        query, kv = layer.query_heads * shape.head_dim, layer.kv_heads * shape.head_dim
        hidden, mlp = shape.hidden_size, layer.mlp_channels
        found += [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
        found += [(hidden, mlp), (hidden, mlp), (mlp, hidden)]
    return found


MAX_KV_CACHE_BYTES = 2**32
"""Limit in bytes for the KV cache of texts that are generated together. One text is always allowed."""
MAX_GENERATION_BATCH = 64
"""Maximum number of texts that are generated together."""
FP64 = 8


Fit = Literal["no", "layer by layer", "all layers"]
"""Whether o and down are fitted, and for how many layers at once the matrices of the fit are in memory."""


@dataclass(frozen=True)
class Workload:
    """The operations that a model is loaded for, as far as they need memory.

    A token count is 0 if it depends on a text that has not been read yet.
    """

    seqlen: int = 2048
    """Length of the longest window in tokens."""
    hidden_state_tokens: int = 0
    """Tokens whose hidden states are kept in main memory between layers."""
    calibration_tokens: int = 0
    predicted_tokens: int = 0
    """Tokens whose dense predictions are kept in main memory."""
    generates_text: bool = False
    """Whether the model generates its own text first."""
    keeps_kv_cache: bool = False
    """Whether the KV cache of the whole window is kept."""
    computes_gradients: bool = False
    measures_sensitivity: bool = False
    """Whether sensitivity is measured, which keeps each layer's input for a batch of tokens."""
    eliminates: bool = False
    """Whether heads and channels are scored by backward elimination."""
    reconstructs: Fit = "no"
    """Whether o and down are fitted by least squares, and if so, for how many layers at once the matrices of the fit
    (products of inputs) are in memory."""
    kept: float = 1.0
    """Share of the parameters that plans keep."""
    training: Training | None = None

    @classmethod
    def of(cls, spec: SearchSpec) -> "Workload":
        """Return the workload of preparing and measuring `spec`."""
        measured = [text for text in (spec.fitness, spec.report) if text is not None]
        texts = [spec.calibration, *measured]
        return cls(
            seqlen=max(text.seqlen for text in texts),
            hidden_state_tokens=_tokens(spec.calibration) if spec.scoring == "sequential" else 0,
            calibration_tokens=_tokens(spec.calibration),
            predicted_tokens=sum(_tokens(text) for text in measured) if spec.measure == "kl" else 0,
            generates_text=any(text.source == "self" for text in texts),
            computes_gradients=spec.importance == "taylor",
            eliminates=spec.importance == "obs",
            # A search always measures sensitivity, an allocation only with the method `sensitivity`. The spec does not
            # say whether it is for a search or an allocation.
            measures_sensitivity=True,
            reconstructs=_reconstructs(spec),
            kept=1 - spec.rate,
        )


def _reconstructs(spec: SearchSpec) -> Fit:
    if spec.reconstruction == "none":
        return "no"
    return "all layers" if spec.scoring == "dense" else "layer by layer"


def _tokens(text: TextSpec) -> int:
    return (text.windows or 0) * text.seqlen


def _pinned_fit_bytes(shape: ModelShape) -> int:
    """Return the bytes of all factors and targets in pinned memory, of which torch takes powers of two."""
    found = 0
    for layer in shape.layers:
        for inputs in (layer.query_heads * shape.head_dim, layer.mlp_channels):
            for columns in (inputs, shape.hidden_size):
                found += 1 << (inputs * columns * FP32 - 1).bit_length()
    return found


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes that a model takes; upper bounds if the exact number is not known."""

    weights: int
    """All parameters in the dtype they are loaded in; exact."""
    pruned_copies: int
    """Bytes of copied weights for the most expensive plan. A plan that keeps fewer query heads per KV head copies q and
    o. With reconstruction, o and down are fitted copies."""
    activations: int
    """Bytes on each device in addition to the weights, for the largest of these, which are not needed at the same time:
    the activations of one window, a copy of one layer while it is scored and ordered, the KV cache of generated texts,
    a gradient pass, fine-tuning, and the layer inputs that sensitivity keeps. With several devices, each device is
    assumed to need the total of all devices."""
    main_memory: int
    """Bytes in main memory, whichever device runs the model: hidden states that sequential scoring keeps, and
    predictions of the dense model."""
    fitted_copies: int = 0
    """The part of `pruned_copies` that every plan needs: the columns of o and down that remain, and are fitted."""
    reconstruction: int = 0
    """Data that reconstruction, or scoring by elimination, keeps for each layer: input products and their factors."""
    training_state: int = 0
    """Data that fine-tuning keeps beside the weights: for trained parameters fp32 copies, gradients and AdamW's
    moments, and the weights of a teacher."""
    fit: Fit = "no"
    models: int = 1
    """Number of models loaded together."""
    fit_on_device: bool = True
    with_fit_in_main_memory: "MemoryEstimate | None" = None
    """The same with the matrices of the fit in main memory, but for those of one layer; None if that is not possible.
    For each candidate, those of the layers that it changes are copied to the device."""

    @property
    def minimum(self) -> int:
        """Return the bytes on the device that are needed in any case."""
        return self.weights + self.fitted_copies + self.reconstruction + self.training_state + self.activations

    @property
    def description(self) -> str:
        """Return the estimate in words."""
        parts = [f"{gigabytes(self.weights)} for weights", f"{gigabytes(self.activations)} to run them"]
        if self.pruned_copies:
            parts.append(f"up to {gigabytes(self.pruned_copies)} for copies of pruned weights")
        if self.reconstruction:
            of = "scoring" if self.fit == "no" else "the fit"
            parts.append(f"{gigabytes(self.reconstruction)} for the matrices of {of}")
        if self.training_state:
            parts.append(f"{gigabytes(self.training_state)} for what is trained")
        if self.main_memory:
            what = "texts" if self.fit_on_device else "texts and the other matrices of the fit"
            parts.append(f"{gigabytes(self.main_memory)} of main memory for {what}")
        return f"about {', '.join(parts)}"


def estimate_memory(decoder: Decoder, dtype: torch.dtype, workload: Workload, device: str) -> MemoryEstimate:
    """Estimate the memory that the model of `decoder` needs in `dtype`; `device` is a type of device, `cuda` or `cpu`.

    The decoder itself may be on the meta device.
    """
    shape = decoder.shape
    size = dtype.itemsize
    vocabulary = decoder.head.out_features
    keys = kv_cache_bytes(shape, size, workload.seqlen) if workload.keeps_kv_cache else 0
    running = [_window_bytes(shape, _logits_chunk(device, vocabulary, workload.seqlen), size, workload.seqlen) + keys]
    running += [shape.layer_parameters(i) * size for i in range(len(shape.layers))]
    running += [_scoring_bytes(shape, layer) for layer in shape.layers]
    if workload.generates_text:
        text = kv_cache_bytes(shape, size, workload.seqlen)
        running.append(text * generation_batch_size(shape, size, workload.seqlen))
    if workload.computes_gradients:
        running.append(_gradient_bytes(shape, vocabulary, size))
    if workload.measures_sensitivity:
        inputs = len(shape.layers) * SENSITIVITY_TOKENS * shape.hidden_size * size
        logits = _logits_chunk(device, vocabulary, SENSITIVITY_TOKENS)
        running.append(inputs + _window_bytes(shape, logits, size, SENSITIVITY_TOKENS))
    if workload.training is not None:
        chunk = _logits_chunk(device, vocabulary, workload.training.tokens)
        running.append(workload.training.activation_bytes(shape, size) + 3 * chunk)
    whole = MemoryEstimate(
        weights=shape.total_parameters * size,
        pruned_copies=sum(_copied_parameters(shape, layer, workload.reconstructs != "no") for layer in shape.layers)
        * size,
        reconstruction=_reconstruction_values(shape, workload) * FP32,
        fit=workload.reconstructs,
        fitted_copies=_fitted_parameters(shape, workload) * size,
        training_state=0 if workload.training is None else workload.training.resident_bytes(shape, size),
        activations=max(running),
        main_memory=workload.hidden_state_tokens * shape.hidden_size * size
        + workload.predicted_tokens * KL_TOP_K * (INT32 + size),
    )
    if workload.reconstructs != "all layers" or workload.eliminates:
        return whole
    one_layer = replace(workload, reconstructs="layer by layer")
    states = workload.calibration_tokens * shape.hidden_size * size
    in_main_memory = replace(
        whole,
        fit_on_device=False,
        reconstruction=_reconstruction_values(shape, one_layer) * FP32,
        main_memory=whole.main_memory + _pinned_fit_bytes(shape) + states,
    )
    return replace(whole, with_fit_in_main_memory=in_main_memory)


def combined(estimates: Sequence[MemoryEstimate]) -> MemoryEstimate:
    """Combine the estimates of models that are loaded together, run in turn, and are not pruned or trained."""
    return MemoryEstimate(
        weights=sum(estimate.weights for estimate in estimates),
        pruned_copies=0,
        activations=max(estimate.activations for estimate in estimates),
        main_memory=0,
        models=len(estimates),
    )


def kv_cache_bytes(shape: ModelShape, size: int, tokens: int) -> int:
    """Return the bytes of the KV cache of a text of `tokens` tokens, in a dtype of `size` bytes."""
    return 2 * size * tokens * shape.head_dim * sum(layer.kv_heads for layer in shape.layers)


def generation_batch_size(shape: ModelShape, size: int, tokens: int) -> int:
    """Return how many texts of `tokens` tokens are generated together; their KV cache must fit MAX_KV_CACHE_BYTES.

    The number must not depend on the machine, because the generated text depends on the number.
    """
    return max(1, min(MAX_GENERATION_BATCH, MAX_KV_CACHE_BYTES // kv_cache_bytes(shape, size, tokens)))


def _logits_chunk(device: str, vocabulary: int, tokens: int) -> int:
    """Return the bytes of one chunk of fp32 logits."""
    return min(LOGITS_CHUNK_BYTES[device], FP32 * tokens * vocabulary)


def _window_bytes(shape: ModelShape, logits: int, size: int, seqlen: int) -> int:
    """Return the peak of activations while a window runs: in the widest layer, or with a chunk of logits.

    `logits` is the size of that chunk in fp32, in bytes.
    """
    # The residual stream, a block's input and output, and a norm's fp32 copies.
    stream = shape.hidden_size * (3 * size + 2 * FP32)
    # Gate, up and their product, and the product's square during calibration.
    mlp = max(layer.mlp_channels for layer in shape.layers) * (3 * size + 2 * FP32)
    # Queries, keys and values are projected, rotated and laid out for the kernel, which never builds the full attention
    # matrix.
    attention = 3 * size * shape.head_dim * max(layer.query_heads + 2 * layer.kv_heads for layer in shape.layers)
    # The chunk in fp32, its softmax, and the chunk in the model's dtype.
    return seqlen * stream + max(seqlen * mlp, seqlen * attention, 2 * logits + logits * size // FP32)


def _gradient_bytes(shape: ModelShape, vocabulary: int, size: int) -> int:
    """Return the bytes of a backward pass over LLM-Pruner's samples: activations, logits and one weight's gradient."""
    mlp = 4 * size * sum(layer.mlp_channels for layer in shape.layers)
    attention = 3 * size * shape.head_dim * sum(layer.query_heads + 2 * layer.kv_heads for layer in shape.layers)
    stream = len(shape.layers) * shape.hidden_size * (6 * size + 2 * FP32)
    logits = vocabulary * (size + 3 * FP32)
    largest = shape.hidden_size * max(layer.mlp_channels for layer in shape.layers)
    return GRADIENT_SAMPLES * GRADIENT_TOKENS * (mlp + attention + stream + logits) + largest * (size + 3 * FP32)


def _scoring_bytes(shape: ModelShape, layer: LayerShape) -> int:
    """Return the bytes of a chunk of the widest projection in fp64, and of its absolute values.

    Wanda-sp needs these bytes. OWL and magnitude need less for the same number of rows.
    """
    widest = max(shape.hidden_size, layer.mlp_channels, layer.query_heads * shape.head_dim)
    return 2 * FP64 * min(ROWS_PER_CHUNK, widest) * widest


def _copied_parameters(shape: ModelShape, layer: LayerShape, reconstructs: bool) -> int:
    """Return the number of copied parameters of a layer under the most expensive plan.

    These are the query heads that remain when every KV head loses one query head, and the reconstructed columns.
    """
    heads = layer.kv_heads * (layer.queries_per_kv - 1)
    if not reconstructs:
        return shape.query_head_parameters * heads
    columns = layer.query_heads * shape.head_dim + layer.mlp_channels
    return shape.query_head_parameters * heads + columns * shape.hidden_size


def _fitted_parameters(shape: ModelShape, workload: Workload) -> int:
    """Return about how many parameters of o and down a plan keeps, if they are fitted; none otherwise."""
    if workload.reconstructs == "no":
        return 0
    columns = sum(layer.query_heads * shape.head_dim + layer.mlp_channels for layer in shape.layers)
    return int(workload.kept * columns) * shape.hidden_size


def _reconstruction_values(shape: ModelShape, workload: Workload) -> int:
    """Return the number of values kept for reconstruction: input products of o and down, their targets, and work space.

    Scoring by elimination also keeps the products of all layers, but before reconstruction starts.
    """
    sizes = [(layer.query_heads * shape.head_dim, layer.mlp_channels) for layer in shape.layers]
    widest = max(n for each in sizes for n in each)
    squares = sum(n * n for each in sizes for n in each)
    # For one projection, in fp32: four matrices [inputs, inputs] (damped products, products of the remaining inputs, a
    # factor and an inverse), and two of the weight's size.
    eliminating = squares + widest * (4 * widest + 2 * shape.hidden_size) if workload.eliminates else 0
    if workload.reconstructs == "no":
        return eliminating
    kept = [sum(n * (n + shape.hidden_size) for n in each) for each in sizes]
    # For one layer: damped products, their factor, and an fp32 weight.
    at_work = widest * (2 * widest + shape.hidden_size)
    return max(eliminating, at_work + (sum(kept) if workload.reconstructs == "all layers" else max(kept)))
