"""Weights on the CPU are a mapped file after loading; here they become memory of the process, one at a time."""

import ctypes
import sys

import torch
from torch import Tensor, nn

_PAGE = 4096
_DONTNEED = 4
"""MADV_DONTNEED of Linux."""


def unmap(model: nn.Module) -> None:
    """Copy every parameter that is on the CPU, and give the pages of the original back at once.

    The mapping of a safetensors file lives as long as any tensor of it does, so that ordering the layers' weights would
    leave the originals resident beside the copies: nearly twice the model. On other systems than Linux pages go back
    when the file is closed.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                original = parameter.data
                parameter.data = original.clone()
                _give_back(original)


def _give_back(tensor: Tensor) -> None:
    """Drop the pages that lie wholly in `tensor`, whose content nobody may read again."""
    if sys.platform != "linux":
        return
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    length = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE - start
    if length > 0:
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _DONTNEED)
