"""Reads how much memory this machine has available."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Available memory in bytes."""

    gpus: tuple[int, ...]
    """Free memory of each GPU."""
    main_memory: int
    """Available main memory."""

    @property
    def device(self) -> str:
        """Return the type of device that models are placed on."""
        return "cuda" if self.gpus else "cpu"

    @property
    def description(self) -> str:
        """Return the available memory in words."""
        if not self.gpus:
            return f"the main memory has {gigabytes(self.main_memory)} available and there is no GPU"
        if len(self.gpus) == 1:
            return f"the GPU has {gigabytes(self.gpus[0])} free"
        each = ", ".join(gigabytes(free) for free in self.gpus)
        return f"the {len(self.gpus)} GPUs have {gigabytes(sum(self.gpus))} free ({each})"


def this_machine() -> Machine:
    """Return the memory that this machine has available now; only GPUs in CUDA_VISIBLE_DEVICES count."""
    gpus = tuple(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return Machine(gpus, main_memory())


def has_room(device: torch.device, amount: int, share: float) -> bool:
    """Return whether `amount` bytes are at most this share of what is free on `device`, if that is a GPU."""
    return device.type == "cuda" and amount <= share * torch.cuda.mem_get_info(device)[0]


def main_memory(root: Path = Path("/")) -> int:
    """Return the available main memory in bytes: the kernel's figure, or a container's limit if it is smaller."""
    limits = (root / "sys/fs/cgroup/memory.max", root / "sys/fs/cgroup/memory/memory.limit_in_bytes")
    return min(_available(root / "proc/meminfo"), *(_limit(path) for path in limits))


def _available(meminfo: Path) -> int:
    try:
        lines = dict(_fields(meminfo.read_text()))
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: the total memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _fields(meminfo: str) -> Iterator[tuple[str, str]]:
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        yield name, value


def _limit(path: Path) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return 2**63
    return int(text) if text.isdigit() else 2**63  # "max" if there is no limit


def gigabytes(amount: int) -> str:
    """Return `amount` bytes as text, such as `1.5 GB` or `20.0 MB`."""
    return f"{amount / 1e9:.1f} GB" if amount >= 5e7 else f"{amount / 1e6:.1f} MB"
