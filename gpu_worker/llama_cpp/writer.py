"""Writes a pruned model as one GGUF file that unmodified llama.cpp can load.

llama.cpp's `llama` architecture has the same number of heads in all layers. Its `deci` architecture, made for NVIDIA's
Nemotron models, computes the same with sizes per layer, as plans need.
"""

import logging
import re
from pathlib import Path
from typing import Any

import gguf
import structlog

from gpu_worker.llama_cpp.quantisers import ggml
from gpu_worker.llama_cpp.tensor_types import FILE_TYPES, Kind, kinds_of, needs_ggml
from gpu_worker.llama_cpp.tensors import GgufTensor, rope_factors, tensors_of
from gpu_worker.llama_cpp.vocabulary import read_vocabulary
from gpu_worker.models.loading import LoadedModel
from gpu_worker.progress import Progress, no_progress, steps
from protocol.errors import ModelError
from protocol.plans.plan import Plan
from protocol.results.formats import GgufType

log = structlog.get_logger()
# gguf logs the byte order of every file, and a path that is renamed when the file is complete.
logging.getLogger(gguf.gguf_writer.__name__).setLevel(logging.WARNING)

ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DECI]
FAMILIES = ("llama", "mistral", "qwen2")
"""Families whose decoder layers compute the same as llama.cpp's `deci` layers."""


def write_gguf(
    model: LoadedModel,
    plan: Plan,
    folder: Path,
    *,
    file_type: GgufType,
    name: str,
    progress: Progress = no_progress,
) -> Path:
    """Write `model`, already pruned to `plan`, into `folder` as `<name>-<FILE TYPE>.gguf`; returns that path.

    With `f16`, all matrices are F16. Other types follow llama.cpp's quantiser (tensor_types.py), and the log counts the
    matrices that need another type. Norms and biases are F32. Tensors are converted and written one at a time, so the
    peak memory is that of the largest tensor.

    Raises ModelError if GGUF does not support the model (another family, a sliding window, rope scaling other than
    `linear` and `llama3`, an unknown tokenizer), and if K-quants are requested and llama.cpp is not installed. Raises
    PlanMismatchError for the plan of another model.
    """
    _check_layers(model)
    vocabulary = read_vocabulary(model.tokenizer, model.causal_lm.config)
    tensors = tensors_of(model, plan, file_type)
    if needs_ggml(tensor.type for tensor in tensors):
        ggml()
    path = folder / f"{_file_name(name)}-{file_type.upper()}.gguf"
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        _add_metadata(writer, model, plan, file_type, name)
        vocabulary.add_to(writer)
        _write(writer, tensors, progress)
    finally:
        writer.close()
    _log_fallback_types(tensors, file_type, path)
    return path


def check_gguf(model: LoadedModel, file_type: GgufType = "f16") -> None:
    """Raise ModelError if GGUF does not support `model` or its tokenizer.

    Also raises it if this machine cannot write `file_type`.
    """
    _check_layers(model)
    if needs_ggml(kinds_of(file_type, model.decoder.shape)):
        ggml()
    rope_factors(model.causal_lm.config, model.decoder.shape.head_dim)
    read_vocabulary(model.tokenizer, model.causal_lm.config)


def _check_layers(model: LoadedModel) -> None:
    config = model.causal_lm.config
    family = model.decoder.shape.family
    if family not in FAMILIES:
        raise ModelError(
            f"the format gguf does not support pruned models of the family {family!r}; "
            f"it supports {', '.join(FAMILIES)}; use the format hf or padded"
        )
    if getattr(config, "sliding_window", None) is not None:
        raise ModelError(
            f"the format gguf does not support this model's sliding window ({config.sliding_window} tokens) in layers "
            "of different sizes; use the format hf or padded"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(f"the format gguf supports only the activation silu, but this model has {config.hidden_act!r}")


def _file_name(name: str) -> str:
    """Return the name with each run of characters that are unsafe in file names replaced by a hyphen."""
    return re.sub(r"[^\w.]+", "-", name).strip("-.") or "model"


def _add_metadata(writer: Any, model: LoadedModel, plan: Plan, file_type: GgufType, name: str) -> None:
    config, shape = model.causal_lm.config, model.decoder.shape
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(plan.layers))
    writer.add_head_count([layer.query_heads for layer in plan.layers])
    writer.add_head_count_kv([layer.kv_heads for layer in plan.layers])
    writer.add_feed_forward_length([layer.mlp_channels for layer in plan.layers])
    writer.add_embedding_length(shape.hidden_size)
    # Without it, llama.cpp assumes hidden size / heads of the first layer.
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)


def _write(writer: Any, tensors: tuple[GgufTensor, ...], progress: Progress) -> None:
    """Write header, metadata and the table of tensors, then convert and write each tensor."""
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.stored_shape, tensor.dtype, tensor.nbytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in steps(progress, "writing", tensors):
        writer.write_tensor_data(tensor.data())


def _log_fallback_types(tensors: tuple[GgufTensor, ...], file_type: GgufType, path: Path) -> None:
    """Log the matrices that have more bits than the file type asks for, and whether other MLP widths would help."""
    of = sum(tensor.type != Kind.F32 for tensor in tensors)
    said = {"of": of, "file": path.name, "file_type": file_type}
    otherwise = [tensor for tensor in tensors if tensor.wanted is not None]
    in_f16 = [tensor for tensor in otherwise if tensor.type == Kind.F16]
    in_shorter = [tensor for tensor in otherwise if tensor.type != Kind.F16]
    if in_f16:
        log.warning("tensors_stay_f16", tensors=len(in_f16), advice=_advice(in_f16, 32), **said)
    if in_shorter:
        log.warning("tensors_fall_back", tensors=len(in_shorter), advice=_advice(in_shorter, 256), **said)


def _advice(tensors: list[GgufTensor], multiple: int) -> str:
    """Return advice about row lengths. The plan sets the MLP widths, but the model sets the hidden size."""
    helped = sum(".ffn_down." in tensor.name for tensor in tensors)
    avoids = f"multiple_of {multiple} avoids it"
    if helped == len(tensors):
        return f"their row length is no multiple of {multiple}; {avoids}"
    why = f"their row length is no multiple of {multiple}, because of the model's hidden size"
    return f"{why}; {avoids} for {helped} of them" if helped else why
