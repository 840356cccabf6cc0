"""Weights on the CPU are a mapped file after loading; here they become memory of the process, one at a time."""

import ctypes
import mmap
from bisect import bisect_right
from pathlib import Path

import torch
from torch import Tensor, nn

_DONTNEED = 4
"""MADV_DONTNEED of Linux."""
Ranges = list[tuple[int, int]]
"""First address and the one after the last, in ascending order."""


def unmap(model: nn.Module) -> None:
    """Copy every parameter that is on the CPU, and give the pages of the original back at once.

    The mapping of a safetensors file lives as long as any tensor of it does, so that ordering the layers' weights would
    leave the originals resident beside the copies: nearly twice the model. On other systems than Linux pages go back
    when the file is closed.
    """
    files = _mapped_files()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                original = parameter.data
                parameter.data = original.clone()
                _give_back(original, files)


def _mapped_files() -> Ranges:
    """Where files are mapped into this process; nowhere on systems that do not tell."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    # 7f1c0a000000-7f1c0b000000 r--p 00000000 08:01 1234567 /path, and inode 0 where there is no file.
    lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
    first_and_end = (line[0].split("-") for line in lines if line[4] != "0")
    return [(int(first, 16), int(end, 16)) for first, end in first_and_end]


def _give_back(tensor: Tensor, files: Ranges) -> None:
    """Drop the pages that lie wholly in `tensor`, whose content nobody may read again.

    Only those of a file, which read the same afterwards: of a weight whose type was converted they are the process's
    own memory, and what else might share it would turn to nought.
    """
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0 and _within(files, start, start + length):
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _DONTNEED)


def _within(ranges: Ranges, start: int, end: int) -> bool:
    """Whether one of `ranges` holds all from `start` to `end`."""
    at = bisect_right(ranges, start, key=lambda each: each[0]) - 1
    return at >= 0 and end <= ranges[at][1]
