"""Ways to break a checkpoint folder and a GGUF file: the corpus of test_broken_models.py."""

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.tiny_models import change_config

SENSELESS: tuple[object, ...] = (
    *(0, -1, 10**9, 10**12, 2**63, 2**64),
    *(1.5, 1e308, float("nan"), float("inf")),
    *("", "x", True, [], [1] * 1000, {}, {"a": 1}),
)
"""Values of a config with a wrong type or size."""
COUNTS = (0, 1, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1)
"""Values for eight bytes of a binary header."""


@dataclass(frozen=True)
class Break:
    """A way to break the checkpoint in a folder."""

    name: str
    write: Callable[[Path], object]

    def on(self, folder: Path) -> Path:
        """Break the checkpoint in `folder`, and return the folder."""
        self.write(folder)
        return folder

    def __str__(self) -> str:
        return self.name


def with_header(header: bytes, length: int | None = None, data: bytes = b"") -> Break:
    """Write `model.safetensors` with this header, which claims to be `length` bytes long."""
    claimed = len(header) if length is None else length
    content = struct.pack("<Q", claimed) + header + data
    return Break(f"header {header[:20]!r} of {claimed}", lambda folder: _weights(folder).write_bytes(content))


def with_tensors(*tensors: tuple[str, list[int], list[int]]) -> Break:
    """Write a `model.safetensors` of 64 bytes whose header has these tensors: name, shape, offsets."""
    described = [
        f'"{name}": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}' for name, shape, offsets in tensors
    ]
    header = ("{" + ", ".join(described) + "}").encode()
    return Break(f"tensors {tensors}", with_header(header, data=b"\0" * 64).write)


def with_index(weight_map: object) -> Break:
    """Replace the weights by an index that leads to these files."""
    index = json.dumps({"metadata": {}, "weight_map": weight_map})

    def write(folder: Path) -> None:
        _weights(folder).unlink()
        (folder / "model.safetensors.index.json").write_text(index)

    return Break(f"index {weight_map}", write)


def with_text(name: str, text: str) -> Break:
    return Break(f"{name} {text[:20]}", lambda folder: (folder / name).write_text(text))


def with_holes(name: str, size: int) -> Break:
    """Write a sparse file of this size."""

    def write(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, size)

    return Break(f"{name} of {size}", write)


def with_pipe(name: str) -> Break:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return Break(f"pipe {name}", write)


def with_link(name: str, to: str) -> Break:
    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return Break(f"link {name} to {to}", write)


def with_packed_records(name: str = "pytorch_model.bin") -> Break:
    """Write a torch weights file of a few kB that unpacks to 64 MB, and an index that leads to it."""

    def write(folder: Path) -> None:
        _weights(folder).unlink()
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as records:
            records.writestr("archive/data.pkl", b"\0" * 2**26)
        index = {"metadata": {}, "weight_map": {"a": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    return Break(f"packed records in {name}", write)


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def with_config(folder: Path, **changes: object) -> Path:
    """Change the config in `folder`, and return the folder."""
    change_config(folder, **changes)
    return folder


def with_array(file: Path, count: int) -> Path:
    """Write a GGUF file with one field, an array that claims `count` bytes."""
    field = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, count)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + b"\0" * 64)
    return file


def cuts(data: bytes, every: int) -> Iterator[bytes]:
    """Return all prefixes of `data` whose length is a multiple of `every`."""
    return (data[:size] for size in range(0, len(data), every))


def changes(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield `count` variants of `data` with one byte replaced, or eight by one of COUNTS; determined by the seed."""
    chance = random.Random(seed)
    for _ in range(count):
        changed, place = bytearray(data), chance.randrange(len(data) - 8)
        if chance.random() < 0.5:
            changed[place] = chance.randrange(256)
        else:
            changed[place : place + 8] = struct.pack("<Q", chance.choice(COUNTS))
        yield bytes(changed)
