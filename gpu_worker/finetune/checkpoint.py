"""Checkpoints of fine-tuning, in a folder beside the output, so that a killed run loses only minutes.

A checkpoint is one file, replaced atomically, with fp32 masters, optimizer state and losses. Data order and dropout
follow from the seed and the step, so they are not stored.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from gpu_worker.export.disk_space import check_disk, export_bytes
from gpu_worker.export.folder import ExportError
from gpu_worker.models.memory import FP32, Training
from protocol.errors import ModelError, SettingsError
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Dtype
from protocol.results.finetuning import LossPoint, Recipe
from protocol.results.formats import Destination
from protocol.runtime.locks import try_lock
from protocol.runtime.signals import defer_signals

FILE = "checkpoint.pt"
LOCK = "lock"


@dataclass(frozen=True)
class State:
    """Everything that a later process needs to resume."""

    masters: list[Tensor]
    optimizer: dict[str, Any]
    losses: tuple[LossPoint, ...] = ()
    seconds: float = 0.0
    """Training time so far."""
    finished: bool = False
    """Whether fine-tuning has ended because the steps or the time are used up."""


def folder_beside(out: Path) -> Path:
    """Return the folder for the checkpoint of an output."""
    return out.with_name(f"{out.name}.checkpoint")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a checkpoint folder, and remove it on exit if it is empty.

    Raises ExportError if another process holds the lock or the folder cannot be created.
    """
    try:
        handle = try_lock(folder / LOCK)
    except OSError as error:
        raise ExportError(f"the checkpoint in {folder} cannot be written ({error.strerror})") from error
    if handle is None:
        raise ExportError(f"{folder} is locked by another process that fine-tunes into the same --out")
    try:
        yield
    finally:
        # Remove the lock last, so that the next process finds nothing half done.
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):
            folder.rmdir()


class Checkpoint:
    """The checkpoint of one output. `settings` are the values, by name, that a stored checkpoint must match."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._settings = settings
        self.steps = 0
        """Number of steps in the state that was last read or written."""

    def read(self) -> State | None:
        """Return the stored state, on the CPU; None if no state is stored.

        Raises SettingsError if it has other settings, another model or other data, or cannot be read.
        """
        file = self.folder / FILE
        if not file.exists():
            return None
        try:
            kept = torch.load(file, map_location="cpu", weights_only=True)
            settings, state = kept["settings"], kept["state"]
            losses = tuple(LossPoint.model_validate(point) for point in state.pop("losses"))
            found = State(**state, losses=losses)
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, UnpicklingError) as error:
            raise SettingsError(f"the checkpoint {file} cannot be read; remove {self.folder} to start over") from error
        for name, value in self._settings.items():
            if settings.get(name) != value:
                raise SettingsError(
                    f"the checkpoint in {self.folder} has another {name} ({settings.get(name)!r}, not {value!r}): "
                    "use the original value, or remove the folder to start over"
                )
        self.steps = len(found.losses)
        return found

    def write(self, state: State) -> None:
        """Replace the stored state by `state`, atomically. Raises ExportError.

        Signals are deferred until the file is written.
        """
        content = vars(state) | {"losses": [point.model_dump() for point in state.losses]}
        beside = self.folder / f".{FILE}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with defer_signals():
                with beside.open("wb") as file:
                    torch.save({"settings": self._settings, "state": content}, file)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self.folder / FILE)
                self.steps = len(state.losses)
        # torch raises RuntimeError when the disk is full.
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise ExportError(f"the checkpoint in {self.folder} cannot be written ({reason})") from error

    def remove(self) -> None:
        """Remove the stored state, after the output was written."""
        for name in (FILE, f".{FILE}"):
            (self.folder / name).unlink(missing_ok=True)


IN_CHECKPOINT = 3 * FP32
"""Bytes of a trained parameter in a checkpoint: master copy and AdamW's two moments."""


def check_finetuning_disk(
    shape: ModelShape, kept: int, recipe: Recipe, dtype: Dtype, destination: Destination, beside: int = 0
) -> None:
    """Raise ModelError if the disk of `destination` has too little space.

    The space is for a model in all formats and for two checkpoints, because the old checkpoint stays until the next one
    is complete. `shape` is the dense model's shape, `kept` the decoder parameters that remain, and `beside` the bytes
    that the pruned model needs on the same disk.
    """
    checkpoint, formats = folder_beside(destination.folder), destination.formats
    if checkpoint.exists() and not checkpoint.is_dir():
        raise ModelError(f"{checkpoint}, the checkpoint folder, is a file; move it, or pass another --out")
    checkpoints = 2 * Training(recipe).parameters(shape) * IN_CHECKPOINT
    needed = export_bytes(shape, kept, formats, dtype, destination.gguf_type) + checkpoints + beside
    freed = sum(file.stat().st_size for file in checkpoint.iterdir()) if checkpoint.exists() else 0
    what = f"fine-tuning into {', '.join(formats)}, with its checkpoints{' and the pruned model' if beside else ''},"
    check_disk(checkpoint, needed, what, freed=freed)
