"""How each tensor of a GGUF file is stored: the type that llama.cpp's own quantiser would choose, by the file's type.

A file type such as Q4_K_M is a mixture. Most matrices have its main type; the head (or the embedding that serves as
head) and, in some layers, v and down have more bits. A type stores blocks of 32 or 256 values of a row: a row of
another length takes a type with shorter blocks, and where not even 32 fit, F16.
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
"""What most matrices of a file are."""
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
"""What the file says of itself."""
K_KINDS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
"""Blocks of 256 values, which only llama.cpp's own library makes."""

_SHORTER = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
_MIXED = ("q4_k_m", "q5_k_m")
_LAYERS_OF_70B = 80


def block_size(kind: Any) -> int:
    """Values of a block."""
    return int(gguf.GGML_QUANT_SIZES[kind][0])


def wanted_kind(file_type: GgufType, name: str, columns: int, layers: int, *, is_head: bool) -> Any:
    """What the matrix `name` with rows of `columns` values is to be, whether or not its rows can be stored so.

    `is_head` is of the matrix that makes logits, the embedding's where that is tied.
    """
    main = MAIN[file_type]
    if is_head and main not in (Kind.F16, Kind.Q8_0):
        return Kind.Q8_0 if columns % block_size(main) else Kind.Q6_K
    if file_type not in _MIXED or not name.startswith("blk."):
        return main
    _, layer, matrix, _ = name.split(".")
    if matrix in ("attn_v", "ffn_down") and _has_more_bits(int(layer), layers):
        return Kind.Q6_K
    # In Llama-2-70B eight query heads share the values.
    return Kind.Q5_K if matrix == "attn_v" and layers == _LAYERS_OF_70B else main


def stored_kind(wanted: Any, columns: int) -> Any:
    """`wanted`, or what rows of `columns` values take in its place."""
    for kind in (wanted, _SHORTER.get(wanted)):
        if kind is not None and columns % block_size(kind) == 0:
            return kind
    return Kind.F16


def kinds_of(file_type: GgufType, shape: ModelShape) -> set[Any]:
    """What matrices of a dense model of this `shape` are stored as."""
    hidden, layers = shape.hidden_size, len(shape.layers)
    rows = {(hidden, "attn_q")}
    rows |= {(layer.query_heads * shape.head_dim, "attn_output") for layer in shape.layers}
    rows |= {(layer.mlp_channels, "ffn_down") for layer in shape.layers}
    wanted = [(wanted_kind(file_type, f"blk.0.{name}.weight", n, layers, is_head=False), n) for n, name in rows]
    wanted.append((wanted_kind(file_type, "output.weight", hidden, layers, is_head=True), hidden))
    return {stored_kind(kind, columns) for kind, columns in wanted}


def needs_ggml(kinds: Iterable[Any]) -> bool:
    """Whether a file with these kinds of tensors takes llama.cpp's library to write."""
    return any(kind in K_KINDS for kind in kinds)


def _has_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and each third one between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
