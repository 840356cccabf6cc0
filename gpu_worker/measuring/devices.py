"""How fast a device is: peaks from data sheets, or a matrix product measured on this machine."""

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gpu_worker.measuring.half_precision import is_slow
from gpu_worker.models.machine import main_memory
from protocol.errors import ModelError
from protocol.results.needs import DeviceSpeed

_SHEETS = {
    # name: (bf16 tensor TFLOPS without sparsity, fp32 TFLOPS, GB/s, GB)
    "b200": (2250, 75, 8000, 180),
    "h200": (989, 67, 4800, 141),
    "h100": (989, 67, 3350, 80),
    "a100": (312, 19.5, 2039, 80),
    "a100-40gb": (312, 19.5, 1555, 40),
    "l40s": (362, 91.6, 864, 48),
    "rtx-4090": (165, 82.6, 1008, 24),
    "rtx-3090": (71, 35.6, 936, 24),
    "l4": (121, 30.3, 300, 24),
}
"""From NVIDIA's data sheets; SXM versions where there are several."""
GPU_NAMES = tuple(_SHEETS)
SIDES = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the measured product: the size of a small model's MLP, and enough to fill a GPU."""
SECONDS = 0.5


def speed_of_gpu(name: str) -> DeviceSpeed:
    """Return the peaks of the GPU called `name`, one of GPU_NAMES."""
    multiply, solve, read, memory = _SHEETS[name]
    return DeviceSpeed(
        name=name.upper(),
        multiply=multiply * 1e12,
        solve=solve * 1e12,
        read=read * 1e9,
        memory=int(memory * 1e9),
        is_measured=False,
    )


def speed_of_this_machine(dtype: str) -> DeviceSpeed:
    """Measure matrix products on this machine's GPU or CPU for a second, and copying memory.

    Raises ModelError if the GPU cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    used = getattr(torch, dtype)
    if device.type == "cpu" and is_slow(used):
        used = torch.float32  # gpu_worker/measuring/half_precision.py
    try:
        return DeviceSpeed(
            name=torch.cuda.get_device_name(device) if device.type == "cuda" else f"this CPU{_busy()}",
            multiply=_products(device, used),
            solve=_products(device, torch.float32),
            read=_copies(device),
            memory=torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else main_memory(),
            is_measured=True,
        )
    except RuntimeError as error:  # a full GPU, or one that another program has for itself
        raise ModelError(f"the GPU cannot be used: {str(error).splitlines()[0]}; --gpu estimates without it") from error


def _busy() -> str:
    """Return what to add to the name of a CPU that other programs use, because they make every figure worse."""
    is_used = os.getloadavg()[0] > (os.cpu_count() or 1) / 2
    return ", measured while other programs use it" if is_used else ""


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """Return floating-point operations per second of a product [2 · side, side] x [side, side]."""
    side = SIDES[device.type]
    left, right = (torch.randn(rows, side, device=device).to(dtype) for rows in (2 * side, side))
    return 4 * side**3 * _per_second(device, lambda: left @ right)


def _copies(device: torch.device) -> float:
    """Return the bytes per second that are read and written while 256 MB are copied."""
    source = torch.zeros(2**26, device=device)
    return 2 * source.nbytes * _per_second(device, source.clone)


def _per_second(device: torch.device, run: Callable[[], Tensor]) -> float:
    run()
    _wait(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        run()
        _wait(device)
        done += 1
    return done / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
