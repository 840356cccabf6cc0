"""Estimates the disk space of an export, so that it is checked before the slow stages."""

import shutil
from pathlib import Path

import gguf

from gpu_worker.llama_cpp.tensor_types import MAIN
from gpu_worker.models.machine import gigabytes
from protocol.errors import ModelError
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Dtype, SearchSpec
from protocol.results.formats import Destination, Format, Formats, GgufType

SIZES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one weight in each dtype."""


def export_bytes(shape: ModelShape, kept: int, formats: Formats, dtype: Dtype, gguf_type: GgufType = "f16") -> int:
    """Estimate the bytes of all `formats` of a model of this dense `shape` that keeps `kept` decoder parameters.

    For GGUF, a third of the decoder (down_proj) is counted as F16, the type of rows whose length does not fit a block,
    and the rest as the file's main type.
    """
    parameters = kept + shape.other_parameters
    values, stored = gguf.GGML_QUANT_SIZES[MAIN[gguf_type]]
    odd = kept // 3
    sizes: dict[Format, int] = {
        "hf": parameters * SIZES[dtype],
        "padded": shape.total_parameters * SIZES[dtype],
        "gguf": odd * SIZES["float16"] + (parameters - odd) * stored // values,
    }
    return sum(sizes[fmt] for fmt in formats)


def kept_by(rate: float, shape: ModelShape) -> int:
    """Return the number of decoder parameters that remain at this pruning rate."""
    return round((1 - rate) * shape.decoder_parameters)


def check_export_disk(destination: Destination, spec: SearchSpec, shape: ModelShape) -> None:
    """Raise ModelError if the disk has too little space for the export of a model of this dense `shape`."""
    formats = destination.formats
    needed = export_bytes(shape, kept_by(spec.rate, shape), formats, spec.dtype, destination.gguf_type)
    check_disk(destination.folder, needed, f"the export into {', '.join(formats)}")


def check_disk(folder: Path, needed: int, what: str, freed: int = 0) -> None:
    """Raise ModelError if the disk that `folder` is (or will be) on has less than `needed` bytes free.

    `what` names the operation for the message; `freed` are bytes that the operation will free.
    """
    nearest = _nearest(folder)
    free = shutil.disk_usage(nearest).free + freed
    if needed > free:
        raise ModelError(f"{what} needs about {gigabytes(needed)} of disk where {nearest} has {gigabytes(free)} free")


def device_of(folder: Path) -> int:
    """Return the device number of the disk that `folder` is, or will be, on."""
    return _nearest(folder).stat().st_dev


def _nearest(folder: Path) -> Path:
    """Return the folder itself, or its nearest parent that exists."""
    folder = folder.expanduser().resolve()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
