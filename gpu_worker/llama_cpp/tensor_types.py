"""Chooses how each tensor of a GGUF file is stored, as llama.cpp's own quantiser would for the file type.

A file type such as Q4_K_M is a mixture: most matrices have its main type, while the output head (or tied embedding)
and, in some layers, v and down have more bits. A type stores rows in blocks of 32 or 256 values. Rows whose length is
not a multiple of the block size use a type with shorter blocks, or F16.
"""

from collections.abc import Iterable
from typing import Any

import gguf

from protocol.plans.shape import ModelShape
from protocol.results.formats import GgufType

Kind = gguf.GGMLQuantizationType

MAIN: dict[GgufType, Any] = {
    "f16": Kind.F16,
    "q8_0": Kind.Q8_0,
    "q6_k": Kind.Q6_K,
    "q5_k_m": Kind.Q5_K,
    "q5_1": Kind.Q5_1,
    "q5_0": Kind.Q5_0,
    "q4_k_m": Kind.Q4_K,
    "q4_1": Kind.Q4_1,
    "q4_0": Kind.Q4_0,
}
"""Type of most matrices, by file type."""
FILE_TYPES: dict[GgufType, Any] = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
"""Value that states each file type in the file's metadata."""
K_KINDS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
"""Types with blocks of 256 values, which only llama.cpp's own library can write."""

_SHORTER = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
_MIXED = ("q4_k_m", "q5_k_m")
_LAYERS_OF_70B = 80


def block_size(kind: Any) -> int:
    """Return the number of values in a block."""
    return int(gguf.GGML_QUANT_SIZES[kind][0])


def wanted_kind(file_type: GgufType, name: str, columns: int, layers: int, *, is_head: bool) -> Any:
    """Return the type that the matrix `name` with rows of `columns` values should have, even if that type does not fit.

    `is_head` marks the output head, or the embedding if it is tied.
    """
    main = MAIN[file_type]
    if is_head and main not in (Kind.F16, Kind.Q8_0):
        return Kind.Q8_0 if columns % block_size(main) else Kind.Q6_K
    if file_type not in _MIXED or not name.startswith("blk."):
        return main
    _, layer, matrix, _ = name.split(".")
    if matrix in ("attn_v", "ffn_down") and _has_more_bits(int(layer), layers):
        return Kind.Q6_K
    # In Llama-2-70B, eight query heads share each KV head.
    return Kind.Q5_K if matrix == "attn_v" and layers == _LAYERS_OF_70B else main


def stored_kind(wanted: Any, columns: int) -> Any:
    """Return `wanted`, or the type that replaces it for rows of `columns` values."""
    for kind in (wanted, _SHORTER.get(wanted)):
        if kind is not None and columns % block_size(kind) == 0:
            return kind
    return Kind.F16


def kinds_of(file_type: GgufType, shape: ModelShape) -> set[Any]:
    """Return the types that matrices of a dense model of this `shape` are stored as."""
    hidden, layers = shape.hidden_size, len(shape.layers)
    rows = {(hidden, "attn_q")}
    rows |= {(layer.query_heads * shape.head_dim, "attn_output") for layer in shape.layers}
    rows |= {(layer.mlp_channels, "ffn_down") for layer in shape.layers}
    wanted = [(wanted_kind(file_type, f"blk.0.{name}.weight", n, layers, is_head=False), n) for n, name in rows]
    wanted.append((wanted_kind(file_type, "output.weight", hidden, layers, is_head=True), hidden))
    return {stored_kind(kind, columns) for kind, columns in wanted}


def needs_ggml(kinds: Iterable[Any]) -> bool:
    """Return whether writing these types needs llama.cpp's library."""
    return any(kind in K_KINDS for kind in kinds)


def _has_more_bits(layer: int, layers: int) -> bool:
    """Return whether the layer is in the first or last eighth of the layers, or is every third layer between these."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
