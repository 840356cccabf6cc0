"""Checks that one model can be a pruned version of another model, and that both fit into memory."""

from dataclasses import dataclass, replace

from gpu_worker.models.machine import gigabytes, this_machine
from protocol.errors import ModelError
from protocol.plans.shape import LayerShape


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that pruning keeps, and the sizes of its layers, which pruning changes."""

    family: str | None
    """None if a file does not state it."""
    hidden_size: int
    vocabulary: int
    head_dim: int
    layers: tuple[LayerShape, ...]


def check_pruned_from(dense: Sizes, pruned: Sizes, baseline: str) -> None:
    """Raise ModelError unless `pruned` has the architecture and vocabulary of `dense`, and no larger layer."""
    for name, of_dense, of_pruned in (
        ("model type", dense.family, pruned.family),
        ("vocabulary", dense.vocabulary, pruned.vocabulary),
        ("hidden size", dense.hidden_size, pruned.hidden_size),
        ("head width", dense.head_dim, pruned.head_dim),
        ("number of layers", len(dense.layers), len(pruned.layers)),
    ):
        if of_dense != of_pruned and None not in (of_dense, of_pruned):
            raise ModelError(
                f"the baseline {baseline!r} is not the model that was pruned: its {name} is {of_dense}, "
                f"not {of_pruned}; pass the dense model that was pruned"
            )
    for i, (whole, kept) in enumerate(zip(dense.layers, pruned.layers, strict=True)):
        if kept.query_heads > whole.query_heads or kept.mlp_channels > whole.mlp_channels:
            raise ModelError(
                f"the baseline {baseline!r} is smaller than the pruned model in layer {i}; "
                "pass the dense model that was pruned"
            )


def check_memory(needed: int, *, on_gpu: bool) -> None:
    """Raise ModelError if `needed` more bytes do not fit on the GPUs or in main memory."""
    machine = this_machine()
    on_gpu = on_gpu and bool(machine.gpus)
    if needed > (sum(machine.gpus) if on_gpu else machine.main_memory):
        machine = machine if on_gpu else replace(machine, gpus=())
        raise ModelError(
            f"both models together need about {gigabytes(needed)} more where {machine.description}; "
            "use smaller batches (--batch-size), a shorter --prompt or --generate, or a machine with more memory"
        )
