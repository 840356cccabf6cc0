"""Where fine-tuning has got to, in a folder beside the output, so that a kill costs minutes and not the whole.

One file, replaced whole: masters, optimizer, losses. The order of the data and the noise of dropout follow from the
seed and the step, so that they need not be kept.
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
from protocol.results.formats import Formats, GgufType
from protocol.runtime.locks import hold
from protocol.runtime.signals import held_back

FILE = "checkpoint.pt"
LOCK = "lock"


@dataclass(frozen=True)
class State:
    """All that a later process needs to go on."""

    masters: list[Tensor]
    optimizer: dict[str, Any]
    losses: tuple[LossPoint, ...] = ()
    seconds: float = 0.0
    """Of fine-tuning so far."""
    finished: bool = False
    """No step is left to be made."""


def folder_beside(out: Path) -> Path:
    """Where the checkpoint of an output is."""
    return out.with_name(f"{out.name}.checkpoint")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of checkpoints, which goes afterwards where nothing is in it.

    Raises ExportError where another process holds it, or where it cannot be made.
    """
    try:
        handle = hold(folder / LOCK)
    except OSError as error:
        raise ExportError(f"the checkpoint in {folder} cannot be written ({error.strerror})") from error
    if handle is None:
        raise ExportError(f"{folder} is held by another process, which fine-tunes into the same --out")
    try:
        yield
    finally:
        # The lock goes last: whoever comes then finds nothing of ours that is half done.
        (folder / LOCK).unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):
            folder.rmdir()


class Checkpoint:
    """The checkpoint of one output. `settings` are what it has to agree with: by name, in words."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self._settings = settings
        self.steps = 0
        """Of the state that was read or written last."""

    def read(self) -> State | None:
        """What was kept, on the CPU; None where nothing was.

        Raises SettingsError where it is of other settings, another model or other data, or cannot be read.
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
            raise SettingsError(f"the checkpoint {file} cannot be read; remove {self.folder} to begin anew") from error
        for name, value in self._settings.items():
            if settings.get(name) != value:
                raise SettingsError(
                    f"the checkpoint in {self.folder} has another {name} ({settings.get(name)!r}, and not {value!r}): "
                    "give what it was made with, or remove it to begin anew"
                )
        self.steps = len(found.losses)
        return found

    def write(self, state: State) -> None:
        """Keep `state` in place of what was kept before: whole, or not at all. Raises ExportError.

        A signal waits until it is written.
        """
        content = vars(state) | {"losses": [point.model_dump() for point in state.losses]}
        beside = self.folder / f".{FILE}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with held_back():
                with beside.open("wb") as file:
                    torch.save({"settings": self._settings, "state": content}, file)
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(self.folder / FILE)
                self.steps = len(state.losses)
        # torch's own writer says RuntimeError of a full disk.
        except (OSError, RuntimeError) as error:
            beside.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise ExportError(f"the checkpoint in {self.folder} cannot be written ({reason})") from error

    def remove(self) -> None:
        """Remove what was kept: the output is there."""
        for name in (FILE, f".{FILE}"):
            (self.folder / name).unlink(missing_ok=True)


IN_CHECKPOINT = 3 * FP32
"""Of these, what a checkpoint keeps."""


def check_finetuning_disk(
    shape: ModelShape,
    kept: int,
    recipe: Recipe,
    formats: Formats,
    dtype: Dtype,
    checkpoint: Path,
    gguf_type: GgufType = "f16",
    beside: int = 0,
) -> None:
    """Raise ModelError where the disk of `checkpoint`, which the output is beside, has too little room.

    For a model in all `formats`, and for two checkpoints: one is there until the next is whole. `shape` is the dense
    model's, of which `kept` parameters of the decoder stay. `beside` are bytes that the pruned model will take there.
    """
    if checkpoint.exists() and not checkpoint.is_dir():
        raise ModelError(f"{checkpoint}, the folder of checkpoints, is a file; move it, or pass another --out")
    checkpoints = 2 * Training(recipe).parameters(shape) * IN_CHECKPOINT
    needed = export_bytes(shape, kept, formats, dtype, gguf_type) + checkpoints + beside
    there = sum(file.stat().st_size for file in checkpoint.iterdir()) if checkpoint.exists() else 0
    what = f"fine-tuning into {', '.join(formats)}, with its checkpoints{' and what it begins from' if beside else ''},"
    check_disk(checkpoint, needed, what, freed=there)
