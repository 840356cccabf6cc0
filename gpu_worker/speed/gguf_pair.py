"""Provides the dense and the pruned GGUF file for llama.cpp: existing files or converted models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader, LlamaFileType, ReaderTensor

from gpu_worker.export.disk_space import check_disk, export_bytes
from gpu_worker.llama_cpp.tensor_types import FILE_TYPES
from gpu_worker.llama_cpp.writer import write_gguf
from gpu_worker.models.checkpoints import reading, reason
from gpu_worker.models.gguf_layout import open_gguf
from gpu_worker.models.loading import load_model, load_without_weights
from gpu_worker.models.memory import Workload
from gpu_worker.models.sizes import MAX_SIZES
from gpu_worker.progress import Progress
from gpu_worker.speed.compatibility import Sizes
from gpu_worker.speed.engines import SpeedRequest
from protocol.errors import ModelError, SettingsError
from protocol.plans.plan import dense_plan
from protocol.plans.shape import LayerShape
from protocol.results.formats import Formats, GgufType
from protocol.runtime.paths import expanded

ADVICE = "set TMPDIR to a folder with room, or leave the engine out (--engine transformers)"
F16_BYTES = 2
"""Bytes of an element of llama.cpp's KV cache, which is F16 by default."""


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file and the metadata of its model."""

    path: Path
    file_type: int
    sizes: Sizes
    decoder_parameters: int
    total_parameters: int
    weight_bytes: int
    kv_cache_bytes_per_token: int
    longest: int
    """Context length in tokens."""

    @classmethod
    def of(cls, path: Path) -> "GgufModel":
        """Read the file. Raises ModelError if it is not a GGUF file of a decoder."""

        def sentence(error: Exception) -> str:
            return f"{str(path)!r} is not a GGUF file of a model that can be measured ({reason(error)})"

        with reading(sentence):
            reader = open_gguf(path)
            sizes = _sizes(reader)
            widths = [_field(reader, f"attention.{name}_length", sizes.head_dim) for name in ("key", "value")]
            tensors = [tensor for tensor in reader.tensors if not tensor.name.startswith("rope_freqs")]
            return cls(
                path=path,
                file_type=int(reader.fields["general.file_type"].contents()),
                sizes=sizes,
                decoder_parameters=_elements(tensors, "blk."),
                total_parameters=_elements(tensors, ""),
                weight_bytes=sum(int(tensor.n_bytes) for tensor in reader.tensors),
                kv_cache_bytes_per_token=F16_BYTES * sum(widths) * sum(layer.kv_heads for layer in sizes.layers),
                longest=int(_field(reader, "context_length")),
            )

    @property
    def weight_type(self) -> str:
        """Return the file type, such as `q8_0`."""
        return str(LlamaFileType(self.file_type).name).removeprefix("MOSTLY_").lower()

    @property
    def exported_type(self) -> GgufType | None:
        """Return the file type if `selfpruner export` can write it, otherwise None."""
        return next((name for name, number in FILE_TYPES.items() if number == self.file_type), None)


def existing_gguf_files(request: SpeedRequest, formats: Formats) -> tuple[GgufModel | None, GgufModel | None]:
    """Return the existing dense and pruned files; None for a model that must be converted.

    `formats` are the formats of the folder. Raises SettingsError if a file has another type than requested, unless an
    hf export can be converted to that type; ModelError if a file is missing or broken.
    """
    given = expanded(request.baseline)
    dense = GgufModel.of(given) if given.suffix == ".gguf" and given.is_file() else None
    found = sorted(request.folder.glob("*.gguf"))
    if "gguf" in formats and not found:
        raise ModelError(f"the folder {str(request.folder)!r} lacks its GGUF file")
    pruned = GgufModel.of(found[0]) if found else None
    if pruned is not None and "hf" in formats and request.gguf_type not in (None, pruned.exported_type):
        pruned = None
    for model in (dense, pruned):
        if model is not None and request.gguf_type not in (None, model.exported_type):
            raise SettingsError(
                f"--gguf-type {request.gguf_type} is not the type of {str(model.path)!r}, which is "
                f"{model.weight_type}; leave it out, or export the model in that type"
            )
    return dense, pruned


def gguf_files(request: SpeedRequest, formats: Formats, made: Path, progress: Progress) -> tuple[GgufModel, GgufModel]:
    """Return the dense and the pruned file of a folder in these `formats`; converted files go into the folder `made`.

    Converted files get the requested type, otherwise the type of the existing file, otherwise f16. Raises SettingsError
    and ModelError as `existing_gguf_files` does, and ModelError if a model cannot be converted.
    """
    dense, pruned = existing_gguf_files(request, formats)
    if dense is not None and pruned is not None:
        return dense, pruned
    existing = dense or pruned
    file_type = request.gguf_type or "f16" if existing is None else _same_type(existing)
    missing = [name for name, model in ((request.baseline, dense), (str(request.folder), pruned)) if model is None]
    _check_disk(missing, file_type, made, request)
    if pruned is None:
        pruned = _convert(str(request.folder), file_type, made / "pruned", request, progress)
    if dense is None:
        dense = _convert(request.baseline, file_type, made / "dense", request, progress)
    return dense, pruned


def _check_disk(names: Sequence[str], file_type: GgufType, made: Path, request: SpeedRequest) -> None:
    """Raise ModelError if the disk has too little space for the GGUF files of all these models."""
    shapes = [load_without_weights(name, request.dtype).decoder.shape for name in names]
    needed = sum(export_bytes(s, s.decoder_parameters, ("gguf",), request.dtype, file_type) for s in shapes)
    try:
        check_disk(made, needed, f"making GGUF files for llama.cpp ({' and '.join(names)})")
    except ModelError as error:
        raise ModelError(f"{error}; {ADVICE}") from error


def _same_type(model: GgufModel) -> GgufType:
    if model.exported_type is None:
        raise ModelError(
            f"the other model cannot be converted to the type {model.weight_type} of {str(model.path)!r}; "
            f"export both in one of {', '.join(FILE_TYPES)}"
        )
    return model.exported_type


def _convert(name: str, file_type: GgufType, folder: Path, request: SpeedRequest, progress: Progress) -> GgufModel:
    """Convert the model `name`, without pruning, to a GGUF file. Raises ModelError if it cannot be written."""
    model = load_model(name, request.dtype, Workload(seqlen=1))
    plan = dense_plan(model.decoder.shape)
    try:
        folder.mkdir()
        path = write_gguf(model, plan, folder, file_type=file_type, name=folder.name, progress=progress)
    except OSError as error:
        raise ModelError(
            f"the GGUF of {name!r} for llama.cpp cannot be written into {str(folder.parent)!r} ({error.strerror}); "
            f"{ADVICE}"
        ) from error
    return GgufModel.of(path)


def _sizes(reader: GGUFReader) -> Sizes:
    layers = int(_field(reader, "block_count"))
    if not 1 <= layers <= MAX_SIZES["num_hidden_layers"]:
        raise ValueError(f"it claims {layers:,} layers")
    heads, hidden = _per_layer(_field(reader, "attention.head_count"), layers), int(_field(reader, "embedding_length"))
    kv_heads = _per_layer(_field(reader, "attention.head_count_kv", heads), layers)
    widths = _per_layer(_field(reader, "feed_forward_length"), layers)
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    return Sizes(
        family=None,
        hidden_size=hidden,
        vocabulary=int(embedding.shape[1]),
        head_dim=int(_field(reader, "attention.key_length", hidden // heads[0])),
        layers=tuple(
            LayerShape(query_heads=q, kv_heads=kv, mlp_channels=width)
            for q, kv, width in zip(heads, kv_heads, widths, strict=True)
        ),
    )


def _field(reader: GGUFReader, name: str, default: Any = None) -> Any:
    """Return an entry of the architecture's metadata. Raises KeyError if it is missing and has no default."""
    architecture = reader.fields["general.architecture"].contents()
    found = reader.get_field(f"{architecture}.{name}")
    if found is None and default is None:
        raise KeyError(f"{architecture}.{name}")
    return default if found is None else found.contents()


def _per_layer(value: Any, layers: int) -> list[int]:
    """Return one number per layer, from a single number or a list."""
    return [int(each) for each in value] if isinstance(value, list) else [int(value)] * layers


def _elements(tensors: list[ReaderTensor], prefix: str) -> int:
    return sum(int(tensor.n_elements) for tensor in tensors if tensor.name.startswith(prefix))
