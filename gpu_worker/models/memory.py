"""How much memory a model needs, from its config alone, and how much there is: known before any weight is loaded."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import (
    GRADIENT_SAMPLES,
    GRADIENT_TOKENS,
    KL_TOP_K,
    LOGITS_CHUNK_BYTES,
    ROWS_PER_CHUNK,
    SENSITIVITY_TOKENS,
)
from protocol.plans.shape import LayerShape, ModelShape
from protocol.plans.spec import SearchSpec, TextSpec
from protocol.results.finetuning import Recipe
from protocol.runtime.amounts import gigabytes

FP32 = INT32 = 4
BYTES_PER_TRAINED_PARAMETER = 4 * FP32
"""The copy that steps are made on, its gradient, and the two averages of AdamW."""


@dataclass(frozen=True)
class Training:
    """What is trained, and on how many tokens at once."""

    recipe: Recipe

    @property
    def tokens(self) -> int:
        """Most that go through the model at once."""
        return self.recipe.micro_batch * self.recipe.seqlen

    def parameters(self, shape: ModelShape) -> int:
        """How many numbers are trained in a model of this shape, roughly: biases and norms are counted along."""
        if self.recipe.method == "full":
            return shape.decoder_parameters
        return self.recipe.rank * sum(inputs + outputs for inputs, outputs in _projections(shape))

    def resident_bytes(self, shape: ModelShape, size: int) -> int:
        """Bytes that stay while it trains, beside the weights; in a type of `size` bytes."""
        return self.parameters(shape) * (BYTES_PER_TRAINED_PARAMETER + (size if self.recipe.method == "lora" else 0))

    def activation_bytes(self, shape: ModelShape, size: int) -> int:
        """Bytes that a forward pass keeps for the backward one, of all layers; logits aside."""
        attention = 3 * shape.head_dim * sum(layer.query_heads + 2 * layer.kv_heads for layer in shape.layers)
        mlp = 4 * sum(layer.mlp_channels for layer in shape.layers)
        stream = len(shape.layers) * shape.hidden_size * (6 * size + 2 * FP32)
        # LoRA: each projection's input after dropout, and which of it was dropped.
        dropped = (size + 1) * sum(inputs for inputs, _ in _projections(shape)) if self.recipe.method == "lora" else 0
        return self.tokens * ((attention + mlp) * size + stream + dropped)


def _projections(shape: ModelShape) -> list[tuple[int, int]]:
    """Inputs and outputs of each projection."""
    found = []
    for layer in shape.layers:
        query, kv = layer.query_heads * shape.head_dim, layer.kv_heads * shape.head_dim
        hidden, mlp = shape.hidden_size, layer.mlp_channels
        found += [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
        found += [(hidden, mlp), (hidden, mlp), (mlp, hidden)]
    return found


MAX_KV_CACHE_BYTES = 2**32
"""Most that the keys and values of texts being written together may take; one text may always be written."""
MAX_GENERATION_BATCH = 64
"""Most texts written together."""
FP64 = 8


@dataclass(frozen=True)
class Workload:
    """What is going to be run through a model, as far as its memory goes.

    Tokens are counted as 0 where their number follows from a text not yet read.
    """

    seqlen: int = 2048
    """Tokens of the longest window."""
    hidden_state_tokens: int = 0
    """Tokens whose hidden states wait in main memory between two layers."""
    predicted_tokens: int = 0
    """Tokens for which the dense model's predictions are kept in main memory."""
    generates_text: bool = False
    """Whether the model writes its own text first."""
    keeps_kv_cache: bool = False
    """Whether keys and values of the whole window are kept while it runs."""
    computes_gradients: bool = False
    measures_sensitivity: bool = False
    """Whether each layer's input is kept for a batch of tokens."""
    eliminates: bool = False
    """Whether pieces are scored by backward elimination."""
    reconstructs: Literal["no", "layer by layer", "all layers"] = "no"
    """What stays of o and down is fitted, and of how many layers at a time the products of inputs are kept."""
    training: Training | None = None

    @classmethod
    def of(cls, spec: SearchSpec) -> "Workload":
        """What preparing and measuring `spec` runs."""
        measured = [text for text in (spec.fitness, spec.report) if text is not None]
        texts = [spec.calibration, *measured]
        return cls(
            seqlen=max(text.seqlen for text in texts),
            hidden_state_tokens=_tokens(spec.calibration) if spec.scoring == "sequential" else 0,
            predicted_tokens=sum(_tokens(text) for text in measured) if spec.measure == "kl" else 0,
            generates_text=any(text.source == "self" for text in texts),
            computes_gradients=spec.importance == "taylor",
            eliminates=spec.importance == "obs",
            # A search always does, an allocation where its method is that; the spec does not say which it is for.
            measures_sensitivity=True,
            reconstructs=_reconstructs(spec),
        )


def _reconstructs(spec: SearchSpec) -> Literal["no", "layer by layer", "all layers"]:
    if spec.reconstruction == "none":
        return "no"
    return "all layers" if spec.scoring == "dense" else "layer by layer"


def _tokens(text: TextSpec) -> int:
    return (text.windows or 0) * text.seqlen


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a model takes, rounded up where it is not known exactly."""

    weights: int
    """All parameters, in the type they are loaded in; exact."""
    pruned_copies: int
    """Copies at the worst plan: of q and o where query heads kept of every KV head do not lie next to each other, and
    with reconstruction of o and down."""
    activations: int
    """On each device beside the weights: one window's activations, or one layer's copy while it is scored and ordered,
    or the keys and values of texts being written, or the gradients' pass, or the inputs of all layers that sensitivity
    is measured from, whichever is most. Of a model on several devices each is granted what all of them need together.
    """
    main_memory: int
    """In main memory, whatever the device: hidden states that wait between two layers, for windows as long as the spec
    says and not as long as the model's positions reach; and predictions of the dense model."""
    reconstruction: int = 0
    """What reconstruction, or scoring by elimination, keeps beside each layer: products of its inputs, and what is
    fitted to them."""
    training_state: int = 0
    """What fine-tuning keeps of each trained parameter: its fp32 copy, gradient and averages."""
    models: int = 1
    """How many are loaded together."""

    @property
    def minimum(self) -> int:
        """What cannot be done without on the device."""
        return self.weights + self.reconstruction + self.training_state + self.activations

    @property
    def description(self) -> str:
        """All of it: what the model needs."""
        parts = [f"{gigabytes(self.weights)} for weights", f"{gigabytes(self.activations)} to run them"]
        if self.pruned_copies:
            parts.append(f"up to {gigabytes(self.pruned_copies)} for pruned copies")
        if self.reconstruction:
            parts.append(f"{gigabytes(self.reconstruction)} for products of inputs")
        if self.training_state:
            parts.append(f"{gigabytes(self.training_state)} for what is trained")
        if self.main_memory:
            parts.append(f"{gigabytes(self.main_memory)} of main memory for texts")
        return f"about {', '.join(parts)}"


def estimate_memory(decoder: Decoder, dtype: torch.dtype, workload: Workload, device: str) -> MemoryEstimate:
    """The memory that the model of `decoder` takes in `dtype` on a `device` of this type (`cuda`, `cpu`).

    The decoder's own parameters may be on the meta device.
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
    return MemoryEstimate(
        weights=shape.total_parameters * size,
        pruned_copies=sum(_copied_parameters(shape, layer, workload.reconstructs != "no") for layer in shape.layers)
        * size,
        reconstruction=_reconstruction_values(shape, workload) * FP32,
        training_state=0 if workload.training is None else workload.training.resident_bytes(shape, size),
        activations=max(running),
        main_memory=workload.hidden_state_tokens * shape.hidden_size * size
        + workload.predicted_tokens * KL_TOP_K * (INT32 + size),
    )


def combined(estimates: Sequence[MemoryEstimate]) -> MemoryEstimate:
    """What models take that lie side by side, run in turn and are not pruned, trained or given texts that wait."""
    return MemoryEstimate(
        weights=sum(estimate.weights for estimate in estimates),
        pruned_copies=0,
        activations=max(estimate.activations for estimate in estimates),
        main_memory=0,
        models=len(estimates),
    )


def kv_cache_bytes(shape: ModelShape, size: int, tokens: int) -> int:
    """Keys and values of a text of `tokens`, in a type of `size` bytes."""
    return 2 * size * tokens * shape.head_dim * sum(layer.kv_heads for layer in shape.layers)


def generation_batch_size(shape: ModelShape, size: int, tokens: int) -> int:
    """How many texts of `tokens` are written together: as many as keep their keys and values within MAX_KV_CACHE_BYTES.

    It does not depend on the machine: a text follows from its model, sizes and seed.
    """
    return max(1, min(MAX_GENERATION_BATCH, MAX_KV_CACHE_BYTES // kv_cache_bytes(shape, size, tokens)))


def _logits_chunk(device: str, vocabulary: int, tokens: int) -> int:
    """Bytes of one chunk of fp32 logits."""
    return min(LOGITS_CHUNK_BYTES[device], FP32 * tokens * vocabulary)


def _window_bytes(shape: ModelShape, logits: int, size: int, seqlen: int) -> int:
    """Most activations that are alive at once while a window runs: in its widest layer, or with a chunk of logits.

    `logits` are the bytes of such a chunk in fp32.
    """
    # The residual stream, a block's input and output, and what a norm makes of them in fp32.
    stream = shape.hidden_size * (3 * size + 2 * FP32)
    # Gate, up and their product, and the product's square while calibrating.
    mlp = max(layer.mlp_channels for layer in shape.layers) * (3 * size + 2 * FP32)
    # Projected, rotated and laid out for the kernel, which never makes the matrix of all pairs of tokens.
    attention = 3 * size * shape.head_dim * max(layer.query_heads + 2 * layer.kv_heads for layer in shape.layers)
    # The chunk in fp32, its softmax, and what it is in the model's type.
    return seqlen * stream + max(seqlen * mlp, seqlen * attention, 2 * logits + logits * size // FP32)


def _gradient_bytes(shape: ModelShape, vocabulary: int, size: int) -> int:
    """What a backward pass over LLM-Pruner's samples keeps of every layer, its logits, and one weight's gradient."""
    mlp = 4 * size * sum(layer.mlp_channels for layer in shape.layers)
    attention = 3 * size * shape.head_dim * sum(layer.query_heads + 2 * layer.kv_heads for layer in shape.layers)
    stream = len(shape.layers) * shape.hidden_size * (6 * size + 2 * FP32)
    logits = vocabulary * (size + 3 * FP32)
    largest = shape.hidden_size * max(layer.mlp_channels for layer in shape.layers)
    return GRADIENT_SAMPLES * GRADIENT_TOKENS * (mlp + attention + stream + logits) + largest * (size + 3 * FP32)


def _scoring_bytes(shape: ModelShape, layer: LayerShape) -> int:
    """Some rows of the widest projection as fp64, and their absolute values.

    That is Wanda-sp's. OWL (a weight as fp32, its size, that times the activations', what stands out) and magnitude
    take less of as many rows, of all projections.
    """
    widest = max(shape.hidden_size, layer.mlp_channels, layer.query_heads * shape.head_dim)
    return 2 * FP64 * min(ROWS_PER_CHUNK, widest) * widest


def _copied_parameters(shape: ModelShape, layer: LayerShape, reconstructs: bool) -> int:
    """Parameters of the query heads when every KV head loses one: those are copied; and what is fitted anew."""
    heads = layer.kv_heads * (layer.queries_per_kv - 1)
    if not reconstructs:
        return shape.query_head_parameters * heads
    columns = layer.query_heads * shape.head_dim + layer.mlp_channels
    return shape.query_head_parameters * heads + columns * shape.hidden_size


def _reconstruction_values(shape: ModelShape, workload: Workload) -> int:
    """Values kept for reconstruction: a square for the inputs of o and down and their columns, and what is at work.

    Scoring by elimination keeps the squares of all layers too, but before anything is fitted.
    """
    sizes = [(layer.query_heads * shape.head_dim, layer.mlp_channels) for layer in shape.layers]
    widest = max(n for each in sizes for n in each)
    squares = sum(n * n for each in sizes for n in each)
    # Of one projection: damped products, those that are left, their factor and inverse, and two weights in fp32.
    eliminating = squares + widest * (4 * widest + 2 * shape.hidden_size) if workload.eliminates else 0
    if workload.reconstructs == "no":
        return eliminating
    kept = [sum(n * (n + shape.hidden_size) for n in each) for each in sizes]
    # One layer's damped products, their factor, and a weight in fp32.
    at_work = widest * (2 * widest + shape.hidden_size)
    return max(eliminating, at_work + (sum(kept) if workload.reconstructs == "all layers" else max(kept)))


@dataclass(frozen=True)
class Machine:
    """The memory there is, in bytes."""

    gpus: tuple[int, ...]
    """Free on each GPU."""
    main_memory: int
    """Available main memory."""

    @property
    def device(self) -> str:
        """The type of device that models go to."""
        return "cuda" if self.gpus else "cpu"

    @property
    def description(self) -> str:
        """All of it in words."""
        if not self.gpus:
            return f"the main memory has {gigabytes(self.main_memory)} available and there is no GPU"
        if len(self.gpus) == 1:
            return f"the GPU has {gigabytes(self.gpus[0])} free"
        each = ", ".join(gigabytes(free) for free in self.gpus)
        return f"the {len(self.gpus)} GPUs have {gigabytes(sum(self.gpus))} free ({each})"


def this_machine() -> Machine:
    """What this machine has now; GPUs are those that CUDA_VISIBLE_DEVICES leaves."""
    gpus = tuple(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return Machine(gpus, main_memory())


def main_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that are available: what the kernel says, or less in a container with a limit."""
    limits = (root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    return min(_available(root / "proc/meminfo"), *(_limit(path) for path in limits))


def _available(meminfo: Path) -> int:
    try:
        lines = dict(_fields(meminfo.read_text()))
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all there is, whoever uses it
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _fields(meminfo: str) -> Iterator[tuple[str, str]]:
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        yield name, value


def _limit(path: Path) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return 2**63
    return int(text) if text.isdigit() else 2**63  # "max" where there is no limit
