"""The tensors of a pruned model in llama.cpp's names, row order and types; each is converted when it is written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpu_worker.llama_cpp import quantisers as ggml
from gpu_worker.llama_cpp.tensor_types import K_KINDS, Kind, stored_kind, wanted_kind
from gpu_worker.models.families import Layer, family_of
from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.ordered_model import PlanMismatchError
from protocol.errors import ModelError
from protocol.plans.plan import LayerPlan, Plan
from protocol.results.formats import GgufType

_CHUNK = 2**20
"""Number of values converted at a time. Intermediate results are several times larger."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file. `read` returns the values [rows, columns] or [columns], in any dtype on any device."""

    name: str
    shape: tuple[int, ...]
    type: Any
    """A GGMLQuantizationType: F32, F16, or a block type."""
    read: Callable[[], Tensor]
    wanted: Any = None
    """The type that the file type asks for; set only if the length of the rows does not allow it."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape of `data`; for block types, the shape of its bytes."""
        if self.type in (Kind.F32, Kind.F16):
            return self.shape
        return tuple(gguf.quant_shape_to_byte_shape(self.shape, self.type))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of `data`."""
        return np.dtype({Kind.F32: np.float32, Kind.F16: np.float16}.get(self.type, np.uint8))

    @property
    def nbytes(self) -> int:
        """Return the size in the file in bytes."""
        return int(np.prod(self.stored_shape)) * self.dtype.itemsize

    def data(self) -> NDArray[Any]:
        """Return the values as they are stored. Raises ModelError if a value exceeds the range of F16."""
        values = self.read().detach()
        stored = np.empty(self.stored_shape, dtype=self.dtype)
        rows = max(1, _CHUNK * len(values) // values.numel())
        for start in range(0, len(values), rows):
            stored[start : start + rows] = self._encode(values[start : start + rows])
        return stored

    def _encode(self, values: Tensor) -> NDArray[Any]:
        if self.type not in (Kind.F32, Kind.F16):
            quantise = (ggml if self.type in K_KINDS else gguf).quantize
            quantised: NDArray[np.uint8] = quantise(self._finite(values, torch.float32), self.type)
            return quantised
        return self._finite(values, torch.float32 if self.type == Kind.F32 else torch.float16)

    def _finite(self, values: Tensor, dtype: torch.dtype) -> NDArray[Any]:
        converted = values.to(dtype)
        if not torch.isfinite(converted).all():
            raise ModelError(f"the tensor {self.name} has values that {self.type.name} cannot hold")
        return converted.cpu().contiguous().numpy()


def tensors_of(model: LoadedModel, plan: Plan, file_type: GgufType) -> tuple[GgufTensor, ...]:
    """Return all tensors of the file in order, not converted yet.

    Raises PlanMismatchError if the layers do not have the sizes of `plan`, ModelError for a rope scaling that GGUF does
    not support.
    """
    decoder = model.decoder
    tied = decoder.head.weight is decoder.embedding.weight
    return tuple(_all(_Maker(file_type, len(decoder.layers), tied=tied), model, plan))


class _Maker:
    """Chooses the type of each tensor."""

    def __init__(self, file_type: GgufType, layers: int, *, tied: bool) -> None:
        self._file_type = file_type
        self._layers = layers
        self._head = "token_embd.weight" if tied else "output.weight"

    def vector(self, name: str, values: Tensor, read: Callable[[], Tensor] | None = None) -> GgufTensor:
        """Return a norm, bias or rope factor in F32, the type in which llama.cpp uses these vectors."""
        return GgufTensor(name, tuple(values.shape), Kind.F32, read or (lambda: values))

    def matrix(self, name: str, values: Tensor, read: Callable[[], Tensor] | None = None) -> GgufTensor:
        columns = values.shape[-1]
        wanted = wanted_kind(self._file_type, name, columns, self._layers, is_head=name == self._head)
        stored = stored_kind(wanted, columns)
        return GgufTensor(
            name, tuple(values.shape), stored, read or (lambda: values), None if stored == wanted else wanted
        )

    def linear(self, name: str, linear: nn.Linear, heads: int | None = None) -> Iterator[GgufTensor]:
        """Yield the weight and any bias; with `heads`, rows are in llama.cpp's rope order."""

        def rows(values: Tensor) -> Callable[[], Tensor]:
            return lambda: values if heads is None else interleaved(values, heads)

        yield self.matrix(f"{name}.weight", linear.weight, rows(linear.weight))
        if linear.bias is not None:
            yield self.vector(f"{name}.bias", linear.bias, rows(linear.bias))


def _all(make: _Maker, model: LoadedModel, plan: Plan) -> Iterator[GgufTensor]:
    decoder, config = model.decoder, model.causal_lm.config
    embedding: Any = decoder.embedding.weight
    yield make.matrix("token_embd.weight", embedding)
    yield make.vector("output_norm.weight", decoder.norm.weight)  # type: ignore[arg-type]
    if decoder.head.weight is not embedding:  # without `output` llama.cpp uses the embedding
        yield from make.linear("output", decoder.head)
    factors = rope_factors(config, decoder.shape.head_dim)
    if factors is not None:
        yield make.vector("rope_freqs.weight", factors)
    norms = (*family_of(config).attention_extras, *family_of(config).mlp_extras)
    if len(plan.layers) != len(decoder.layers):
        raise PlanMismatchError(f"the plan is for {len(plan.layers)} layers, the model has {len(decoder.layers)}")
    for i, (layer, kept) in enumerate(zip(decoder.layers, plan.layers, strict=True)):
        _check(i, layer, kept, decoder.shape.head_dim)
        yield from _layer(make, f"blk.{i}", layer, kept, norms)


def _layer(make: _Maker, prefix: str, layer: Layer, kept: LayerPlan, norms: tuple[str, ...]) -> Iterator[GgufTensor]:
    for name, path in zip(("attn_norm", "ffn_norm"), norms, strict=True):
        yield make.vector(f"{prefix}.{name}.weight", layer.module.get_submodule(path).weight)  # type: ignore[arg-type]
    yield from make.linear(f"{prefix}.attn_q", layer.query, kept.query_heads)
    yield from make.linear(f"{prefix}.attn_k", layer.key, kept.kv_heads)
    yield from make.linear(f"{prefix}.attn_v", layer.value)
    yield from make.linear(f"{prefix}.attn_output", layer.output)
    yield from make.linear(f"{prefix}.ffn_gate", layer.gate)
    yield from make.linear(f"{prefix}.ffn_up", layer.up)
    yield from make.linear(f"{prefix}.ffn_down", layer.down)


def _check(i: int, layer: Layer, kept: LayerPlan, head_dim: int) -> None:
    has = (layer.query.out_features, layer.key.out_features, layer.gate.out_features)
    if has != (kept.query_heads * head_dim, kept.kv_heads * head_dim, kept.mlp_channels):
        raise PlanMismatchError(f"layer {i} is not pruned to the plan: it has {has} rows where the plan keeps {kept!r}")


def interleaved(values: Tensor, heads: int) -> Tensor:
    """Reorder the rows of q_proj or k_proj [heads × head dim, ...] for llama.cpp's rotary embedding.

    transformers rotates element i of a head with element i + head dim / 2. llama.cpp's llama models rotate adjacent
    elements. So row i of the first half goes to place 2i, and row i of the second half to place 2i + 1.
    """
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """Return the divisors of the head dim / 2 rope frequencies for llama.cpp, or None without rope scaling.

    Raises ModelError for scalings other than constant factors (`dynamic`, `yarn`, `longrope`).
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("the format gguf does not support pruned models that rotate only a part of each head")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ModelError(f"the format gguf supports the rope scalings linear and llama3, but this model has {kind!r}")
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    return torch.as_tensor(plain / scaled)
