"""Checks the header of a GGUF file against the file's size before the gguf library reads it.

The library trusts every count and makes a Python object of every array element, so a broken count costs minutes and all
memory. This module reads only counts, types and sizes, and rejects impossible values.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGUFReader
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

VERSIONS = (2, 3)
MAX_FIELDS = MAX_TENSORS = 100_000
"""Maximum number of fields, and of tensors. Llama 3.1 405B, with 126 layers, has about 1,100 tensors and 50 fields."""
MAX_ELEMENTS = 2**22
"""Maximum number of array elements in all fields together. Gemma 3 has 1.3 million: tokens, scores, types and
merges."""
MAX_NAME_BYTES = 2**16
MAX_DIMENSIONS = 4

_WIDTHS = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


def open_gguf(path: Path) -> GGUFReader:
    """Check the header of a GGUF file and open it with the gguf library. Raises ValueError, OSError."""
    check_layout(path)
    return GGUFReader(path)


def check_layout(path: Path) -> None:
    """Raise ValueError unless every count, type and offset in the header of `path` fits the file.

    Raises OSError as `open` does.
    """
    with _mapped(path) as data:
        header = _Cursor(data)
        if header.number("<I") != GGUF_MAGIC:
            raise ValueError("GGUF magic invalid")
        version = header.number("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise ValueError(
                "the file is big-endian" if swapped else f"its version is {version}, not {VERSIONS[0]} or {VERSIONS[1]}"
            )
        tensors, fields = header.number("<Q"), header.number("<Q")
        if tensors > MAX_TENSORS or fields > MAX_FIELDS:
            raise ValueError(f"it claims {tensors:,} tensors and {fields:,} fields")
        alignment = _check_fields(header, fields)
        described = _read_tensors(header, tensors)
        start = header.place + -header.place % alignment
        _check_places(described, start, alignment, len(data))


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    if not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as opened:
        if path.stat().st_size < 24:
            raise ValueError("the file is too short to hold a header")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


class _Cursor:
    """A read position in a file. Raises ValueError at the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.place = 0

    def number(self, form: str) -> int:
        """Read an integer in this `struct` format."""
        start = self.place
        self.skip(struct.calcsize(form))
        (value,) = struct.unpack_from(form, self._data, start)
        return int(value)

    def skip(self, size: int) -> None:
        if size > len(self._data) - self.place:
            raise ValueError("the file ends within its header")
        self.place += size

    def skip_text(self) -> None:
        self.skip(self.number("<Q"))

    def text(self) -> str:
        """Read the name of a field or tensor."""
        size = self.number("<Q")
        if size > MAX_NAME_BYTES:
            raise ValueError(f"a name in its header has {size:,} bytes")
        start = self.place
        self.skip(size)
        return self._data[start : self.place].decode()  # UnicodeDecodeError is a ValueError


def _check_fields(header: _Cursor, count: int) -> int:
    """Read past the fields and return the alignment of the tensor data."""
    alignment, names, elements = int(GGUF_DEFAULT_ALIGNMENT), set(), 0
    for _ in range(count):
        name = header.text()
        if name in names:
            raise ValueError(f"the field {name!r} appears twice")
        names.add(name)
        kind = _kind(header.number("<I"))
        if kind == GGUFValueType.ARRAY:
            elements += _skip_array(header, name, MAX_ELEMENTS - elements)
        elif kind == GGUFValueType.STRING:
            header.skip_text()
        elif name == "general.alignment" and kind == GGUFValueType.UINT32:
            alignment = header.number("<I")
        else:
            header.skip(_WIDTHS[kind])
    if alignment not in (2**i for i in range(3, 17)):
        raise ValueError(f"its alignment is {alignment}, which must be a power of two from 8 to 65,536")
    return alignment


def _skip_array(header: _Cursor, name: str, most: int) -> int:
    kind, count = _kind(header.number("<I")), header.number("<Q")
    if kind == GGUFValueType.ARRAY:
        raise ValueError(f"the field {name!r} is an array of arrays")
    if count > most:
        raise ValueError(f"the field {name!r} claims {count:,} elements")
    if kind == GGUFValueType.STRING:
        for _ in range(count):
            header.skip_text()
    else:
        header.skip(count * _WIDTHS[kind])
    return count


def _kind(number: int) -> GGUFValueType:
    try:
        return GGUFValueType(number)
    except ValueError:
        raise ValueError(f"a field has the type {number}, which does not exist") from None


@dataclass(frozen=True)
class _Tensor:
    name: str
    size: int
    offset: int


def _read_tensors(header: _Cursor, count: int) -> list[_Tensor]:
    tensors, names = [], set()
    for _ in range(count):
        name, dimensions = header.text(), header.number("<I")
        if name in names:
            raise ValueError(f"the tensor {name!r} appears twice")
        names.add(name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"the tensor {name!r} has {dimensions:,} dimensions")
        shape = [header.number("<Q") for _ in range(dimensions)]
        tensors.append(_Tensor(name, _bytes_of(name, shape, header.number("<I")), header.number("<Q")))
    return tensors


def _bytes_of(name: str, shape: list[int], kind: int) -> int:
    """Return the bytes of a tensor. Python integers do not overflow, unlike the 64-bit products of the library."""
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (KeyError, ValueError):
        raise ValueError(f"the tensor {name!r} has the type {kind}, which does not exist") from None
    if 0 in shape or shape[0] % block:
        raise ValueError(f"the tensor {name!r} cannot have the shape {shape}")
    return math.prod(shape) // int(block) * int(size)


def _check_places(tensors: list[_Tensor], start: int, alignment: int, end: int) -> None:
    last = start
    for tensor in sorted(tensors, key=lambda each: each.offset):
        first = start + tensor.offset
        if tensor.offset % alignment:
            raise ValueError(f"the tensor {tensor.name!r} does not begin at a multiple of {alignment} bytes")
        if first < last:
            raise ValueError(f"the tensor {tensor.name!r} overlaps another one")
        last = first + tensor.size
        if last > end:
            raise ValueError(f"the tensor {tensor.name!r} ends at byte {last:,} of a file of {end:,}")
