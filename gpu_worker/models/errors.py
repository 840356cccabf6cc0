"""Errors about memory, the device and broken models, and how messages quote values."""

import torch

from protocol.errors import SelfPrunerError

_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "_ALLOC_FAILED")
"""Messages of the CPU allocator, of the CUDA driver (the context survives), and of cuBLAS and cuDNN for workspaces."""
MAX_QUOTED_CHARACTERS = 60
"""Maximum number of characters of a value that an error message quotes."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the GPU or the CPU ran out of memory. Allocators other than torch's say so only in the message."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in text for sign in _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Return whether the CUDA context is broken, so that every later call fails, as after a device-side assert."""
    text = str(error)
    return "device-side assert" in text or "CUDA error" in text


class NotFiniteError(SelfPrunerError):
    """The loss is infinite or NaN, because the dense or the pruned model is broken."""


def quoted(value: object) -> str:
    """Return a value for an error message: short and on one line, whatever the file contains."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]} …"
