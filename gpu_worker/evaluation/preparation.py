"""What preparation finds out about the dense model, kept in the cache for the next search, worker or command.

An entry is used again only by the same code, on the same model, device and calibration text, so that a figure is the
same whether it was computed or read.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gpu_worker
import protocol.plans
from gpu_worker.cache import remembered
from gpu_worker.measuring.corpora import windows_digest
from gpu_worker.measuring.divergence import DensePredictions
from gpu_worker.measuring.half_precision import is_slow
from gpu_worker.models.loading import LoadedModel, device_name
from gpu_worker.pruning.calibration import LayerActivations, LayerProducts
from gpu_worker.pruning.importance import LayerImportance
from protocol.plans.profile import DensePerplexity
from protocol.plans.spec import SearchSpec

DETERMINING_CODE = ("models", "measuring", "pruning", "evaluation")
"""The wings of the worker whose code determines what is measured."""
UNIT_FIELDS = {
    "rate", "granularity", "split", "lowest_rate", "highest_rate", "multiple_of", "scoring", "reconstruction",
}  # fmt: skip
"""The fields of a spec that determine how a single unit is pruned."""
FIGURES = "figures.json"
Key = dict[str, Any]
Dense = tuple[DensePerplexity, DensePredictions | None]
"""The dense model's perplexity on a text, and its predictions if divergence from them is measured."""
F = TypeVar("F", tuple[float, ...], dict[str, tuple[float, ...]])
T = TypeVar("T", LayerImportance, LayerActivations, LayerProducts)


@dataclass(frozen=True)
class Calibration:
    """What the calibration text says about each layer of the dense model."""

    importance: list[LayerImportance]
    activations: list[LayerActivations]
    """Empty unless scores, or OWL's outliers, need them."""
    products: list[LayerProducts]
    """Empty unless the weights are fitted."""

    @property
    def bytes(self) -> int:
        """Return the bytes of all tensors."""
        tensors = (getattr(each, f.name) for part in self._parts.values() for each in part for f in fields(each))
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def save(self, folder: Path) -> None:
        """Write a file for each layer."""
        for i in range(len(self.importance)):
            tensors = {
                f"{name}.{field.name}": getattr(part[i], field.name).contiguous()
                for name, part in self._parts.items()
                if part
                for field in fields(part[i])
            }
            save_file(tensors, folder / f"layer-{i}.safetensors")

    @classmethod
    def load(cls, devices: Sequence[torch.device], products_on: torch.device | None, folder: Path) -> "Calibration":
        """Read what `save` wrote, each layer onto its device, and products onto `products_on` if that is given."""
        layers = [_load(folder / f"layer-{i}.safetensors", device, products_on) for i, device in enumerate(devices)]
        return cls(
            _parts(LayerImportance, "importance", layers),
            _parts(LayerActivations, "activations", layers),
            _parts(LayerProducts, "products", layers),
        )

    @property
    def _parts(self) -> "dict[str, list[LayerImportance] | list[LayerActivations] | list[LayerProducts]]":
        return {"importance": self.importance, "activations": self.activations, "products": self.products}


def preparation_key(model: LoadedModel, spec: SearchSpec, calibration: Tensor) -> Key:
    """Return what everything depends on that preparation measures, with windows `calibration` (long, [n, seqlen])."""
    dtype, device = model.causal_lm.dtype, device_name(model.device)
    if model.device.type == "cpu":
        device = f"cpu ({torch.backends.cpu.get_cpu_capability()}{', slow' if is_slow(dtype) else ''})"
    return {
        "code": _code_digest(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "weights": model.identity,
        "dtype": str(dtype),
        "device": device,
        "calibration": windows_digest(calibration),
        "importance": spec.importance,
    }


def remembered_calibration(
    key: Key,
    about: str,
    devices: Sequence[torch.device],
    compute: Callable[[], Calibration],
    *,
    products_on: torch.device | None = None,
) -> Calibration:
    """Return the calibration of `key`; from the cache, each layer is read onto its device of `devices`.

    Products are read onto `products_on` if that is given.
    """
    return remembered(
        "calibration",
        key,
        compute,
        about=about,
        write=Calibration.save,
        read=partial(Calibration.load, devices, products_on),
        size=lambda found: found.bytes,
    )


def remembered_units(kind: str, key: Key, spec: SearchSpec, measure: Callable[[], F]) -> F:
    """Return what `measure` finds of each unit, pruned alone as `spec` says: floats in tuples, or in a dict of them."""

    def write(found: F, folder: Path) -> None:
        (folder / FIGURES).write_text(json.dumps(found))

    def read(folder: Path) -> F:
        found = json.loads((folder / FIGURES).read_bytes())
        named = {name: tuple(values) for name, values in found.items()} if isinstance(found, dict) else tuple(found)
        return cast(F, named)

    key = key | spec.model_dump(mode="json", include=UNIT_FIELDS)
    return remembered(kind, key, measure, about=spec.model, write=write, read=read)


def remembered_dense(key: Key, about: str, windows: Tensor, measure: Callable[[], Dense]) -> Dense:
    """Return the dense model's perplexity and predictions on `windows` (long, [n, seqlen])."""
    return remembered(
        "predictions",
        key | {"windows": windows_digest(windows)},
        measure,
        about=about,
        write=_save_dense,
        read=_load_dense,
        size=lambda found: 0 if found[1] is None else found[1].bytes,
    )


def _save_dense(found: Dense, folder: Path) -> None:
    perplexity, predictions = found
    (folder / FIGURES).write_text(perplexity.model_dump_json())
    if predictions is not None:
        save_file(vars(predictions), folder / "predictions.safetensors")


def _load_dense(folder: Path) -> Dense:
    perplexity = DensePerplexity.model_validate_json((folder / FIGURES).read_bytes())
    file = folder / "predictions.safetensors"
    return perplexity, DensePredictions(**_load(file, torch.device("cpu"))) if file.exists() else None


def _load(file: Path, device: torch.device, products_on: torch.device | None = None) -> dict[str, Tensor]:
    # Copied, because tensors on the CPU are views of the file, which may be deleted while they are used.
    return {
        name: tensor.to((name.startswith("products.") and products_on) or device, copy=True)
        for name, tensor in load_file(file).items()
    }


def _parts(kind: type[T], name: str, layers: list[dict[str, Tensor]]) -> list[T]:
    """Return one `kind` for each layer, or nothing if no layer has its tensors."""
    if f"{name}.{fields(kind)[0].name}" not in layers[0]:
        return []
    return [kind(**{field.name: layer[f"{name}.{field.name}"] for field in fields(kind)}) for layer in layers]


@cache
def _code_digest() -> str:
    worker = Path(gpu_worker.__file__).parent
    files = [*Path(protocol.plans.__file__).parent.glob("*.py")]
    for wing in DETERMINING_CODE:
        files += (worker / wing).glob("*.py")
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]
