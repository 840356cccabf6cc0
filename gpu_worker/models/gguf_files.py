"""Loads GGUF files as target models: converts each file once to a normal checkpoint in the cache."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import torch
import transformers
from gguf import GGUFReader
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gpu_worker.cache import cached
from gpu_worker.models.checkpoints import load_weights, reading, reason
from gpu_worker.models.families import family_of
from gpu_worker.models.gguf_layout import open_gguf
from gpu_worker.models.identity import file_identity
from gpu_worker.models.machine import gigabytes, main_memory
from gpu_worker.models.sizes import check_sizes
from protocol.errors import ModelError

SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
"""Config sizes by the GGUF fields that hold them (prefixed with the architecture in the file)."""
EXPORTED = "deci"
"""The architecture of this project's exports, which has different sizes per layer."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Rope settings that Llama 3.1, 3.2 and 3.3 share; their factors differ."""


@dataclass(frozen=True)
class GgufHeader:
    """Metadata of a GGUF file."""

    architecture: str
    sizes: Mapping[str, Any]
    """Sizes by their names in a config."""
    parameters: int
    rope_scaling: str
    """Type of rope scaling; empty if there is none."""
    rope_factors: tuple[float, ...]
    """Divisors of the rotary frequencies, as in Llama 3.1; empty if there are none."""

    @classmethod
    def of(cls, reader: GGUFReader) -> "GgufHeader":
        """Return the header of an open GGUF file."""
        architecture = _text(reader, "general.architecture")
        scaling = _text(reader, f"{architecture}.rope.scaling.type")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if "rope_factors_long.weight" in tensors:
            scaling = "longrope"
        factors = tensors.get("rope_freqs.weight")
        return cls(
            architecture=architecture,
            sizes={key: _value(reader, f"{architecture}.{field}") for field, key in SIZES.items()},
            parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
            rope_scaling="" if scaling == "none" else scaling,
            rope_factors=() if factors is None else tuple(float(x) for x in factors.data),
        )


def unpacked(file: Path, dtype: str) -> Path:
    """Return the folder with a GGUF file's model as a checkpoint in `dtype`; the first call writes it.

    A file with a new modification time is unpacked again. Raises ModelError for a file that transformers cannot read,
    or would read as a different model.
    """
    return cached(f"gguf-{file_identity(file)}-{dtype}", lambda folder: _unpack(file, folder, getattr(torch, dtype)))


def _unpack(file: Path, folder: Path, dtype: torch.dtype) -> None:
    def sentence(error: Exception) -> str:
        return f"the GGUF file {str(file)!r} cannot be unpacked ({reason(error)}); pass the model's folder"

    with reading(sentence), _read_once(file) as reader:
        header = GgufHeader.of(reader)
        _check(file, header, dtype)
        place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        config = transformers.AutoConfig.from_pretrained(**place)
        family_of(config)
        _restore_rope(file, header, config)
        _plain_model(file, config, dtype).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


@contextmanager
def _read_once(file: Path) -> Iterator[GGUFReader]:
    """Yield a reader of `file`, which transformers uses too in this context. Raises ValueError for no GGUF file.

    transformers reads the header anew for the config, the weights and the tokenizer, and each time takes seconds for
    the vocabulary; it also computes the same names of tensors for each of its modules.
    """
    reader = open_gguf(file)
    names = cache(gguf.get_tensor_name_map)
    with patch.object(gguf, "GGUFReader", lambda _: reader), patch.object(gguf, "get_tensor_name_map", names):
        yield reader


def _check(file: Path, header: GgufHeader, dtype: torch.dtype) -> None:
    if header.architecture == EXPORTED:
        raise ModelError(
            f"{str(file)!r} is a pruned export for llama.cpp, which transformers cannot load; "
            "pass the hf or the padded export of the same model"
        )
    check_sizes(str(file), header.sizes)
    if header.rope_scaling:
        raise ModelError(
            f"{str(file)!r} uses rope scaling ({header.rope_scaling}), which transformers does not read from GGUF "
            "files; pass the model's folder"
        )
    needed, available = header.parameters * dtype.itemsize, main_memory()
    if needed > available:
        raise ModelError(
            f"unpacking {str(file)!r} needs about {gigabytes(needed)} of main memory where {gigabytes(available)} are "
            "available; pass the model's folder, or use a machine with more"
        )


def _restore_rope(file: Path, header: GgufHeader, config: Any) -> None:
    """Set Llama 3.1's rope scaling in `config`, because transformers drops the file's factors.

    Raises ModelError if the file's factors differ from those of Llama 3.1, 3.2 and 3.3.
    """
    if not header.rope_factors:
        return
    rope = {**config.rope_parameters, **LLAMA3_ROPE, "factor": max(header.rope_factors)}
    config.rope_parameters = rope
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    steps = torch.arange(len(scaled)) / len(scaled)
    if not torch.allclose(rope["rope_theta"] ** -steps / scaled, torch.tensor(header.rope_factors), rtol=1e-3):
        raise ModelError(f"{str(file)!r} has unknown rope scaling factors; pass the model's folder")


def _plain_model(file: Path, config: Any, dtype: torch.dtype) -> Any:
    """Return the model with dequantised weights and without a quantisation config."""
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Without `dequantize` the loader warns about missing kernels. Older versions of transformers always dequantise.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = load_weights(file.name, str(file.parent), dtype, gguf_file=file.name, config=config, **options)
    marked = loaded.config.to_dict()
    marked.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(loaded)(type(config).from_dict(marked)).to(dtype)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _text(reader: GGUFReader, name: str) -> str:
    value = _value(reader, name)
    return "" if value is None else str(value)


def _value(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
