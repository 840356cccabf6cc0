"""Where the time of a measurement goes, by torch's profiler."""

from collections.abc import Callable

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

KINDS = {
    "products": {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mkldnn_linear", "mkldnn_matmul"},
    "attention": {"scaled_dot_product_attention"},
    "fit": {"linalg_solve_triangular", "linalg_cholesky_ex", "nonzero", "index"},
    "loss": {
        "_log_softmax", "nll_loss_forward", "logsumexp", "scatter_", "gather", "exp", "where", "amax",
        "cross_entropy_loss", "sum", "exp_", "log_", "sub", "div",
    },
}  # fmt: skip
"""Operators by what they belong to; the rest is `other`: norms, activations, positions, copies."""


def stages(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return the share of each kind of operator in the time of `work` on the device."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])) as profiled:
        work()
    found = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CPU:  # a GPU's kernels are counted with the operators that start them
            found[_kind(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(found.values())
    return {kind: seconds / total for kind, seconds in found.items()}


def _kind(name: str) -> str:
    operator = name.removeprefix("aten::")
    if "attention" in operator:
        return "attention"
    return next((kind for kind, operators in KINDS.items() if operator in operators), "other")
