"""What an error says of the memory and of the device: torch and its libraries tell some of it in their text alone."""

import torch

from protocol.errors import SelfPrunerError

_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "_ALLOC_FAILED")
"""Of the CPU; of the driver, whose context survives; of cuBLAS and cuDNN for their workspaces."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the CPU had no memory left. Allocators other than torch's own say so only in their text."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in text for sign in _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether the CUDA context is broken: after a device-side assert every call fails."""
    text = str(error)
    return "device-side assert" in text or "CUDA error" in text


class NotFiniteError(SelfPrunerError):
    """The loss is infinite or not a number: this model, pruned so, does not compute."""
