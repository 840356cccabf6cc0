"""How much memory and disk fine-tuning takes, known before any weight is loaded."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ModelError
from protocol.finetuning import Recipe
from protocol.formats import Format
from protocol.plan import Plan
from protocol.shape import ModelShape
from protocol.spec import Dtype

FP32 = 4
SIZES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a weight."""
PER_TRAINED = 4 * FP32
"""The copy that steps are made on, its gradient, and the two averages of AdamW."""
IN_CHECKPOINT = 3 * FP32
"""Of these, what a checkpoint keeps."""


@dataclass(frozen=True)
class Training:
    """What is trained, and on how many tokens at once."""

    recipe: Recipe

    @property
    def tokens(self) -> int:
        """Most that go through the model at once."""
        return self.recipe.micro_batch * self.recipe.seqlen

    def parameters(self, shape: ModelShape) -> int:
        """How many numbers are trained in a model of this shape, roughly: biases and norms are counted along."""
        if self.recipe.method == "full":
            return shape.decoder_parameters
        return self.recipe.rank * sum(inputs + outputs for inputs, outputs in _projections(shape))

    def kept(self, shape: ModelShape, size: int) -> int:
        """Bytes that stay while it trains, beside the weights; in a type of `size` bytes."""
        return self.parameters(shape) * (PER_TRAINED + (size if self.recipe.method == "lora" else 0))

    def running(self, shape: ModelShape, size: int) -> int:
        """Bytes that a forward pass keeps for the backward one, of all layers; logits aside."""
        attention = 3 * shape.head_dim * sum(layer.query_heads + 2 * layer.kv_heads for layer in shape.layers)
        mlp = 4 * sum(layer.mlp_channels for layer in shape.layers)
        stream = len(shape.layers) * shape.hidden_size * (6 * size + 2 * FP32)
        # LoRA: each projection's input after dropout, and which of it was dropped.
        dropped = (size + 1) * sum(inputs for inputs, _ in _projections(shape)) if self.recipe.method == "lora" else 0
        return self.tokens * ((attention + mlp) * size + stream + dropped)


def _projections(shape: ModelShape) -> list[tuple[int, int]]:
    """Inputs and outputs of each projection."""
    found = []
    for layer in shape.layers:
        query, kv = layer.query_heads * shape.head_dim, layer.kv_heads * shape.head_dim
        hidden, mlp = shape.hidden_size, layer.mlp_channels
        found += [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
        found += [(hidden, mlp), (hidden, mlp), (mlp, hidden)]
    return found


def disk_needed(shape: ModelShape, plan: Plan, recipe: Recipe, formats: tuple[Format, ...], size: int) -> int:
    """Bytes of a model in all `formats`, and of two checkpoints: one is there until the next is whole.

    `shape` is the dense model's; weights are of `size` bytes, in a GGUF of two.
    """
    kept = plan.decoder_parameters(shape) + shape.other_parameters
    weights = {"hf": kept * size, "padded": shape.total_parameters * size, "gguf": kept * 2}
    checkpoints = 2 * Training(recipe).parameters(shape) * IN_CHECKPOINT
    return sum(weights[fmt] for fmt in formats) + checkpoints


def check_disk(
    shape: ModelShape, plan: Plan, recipe: Recipe, formats: tuple[Format, ...], dtype: Dtype, checkpoint: Path
) -> None:
    """Raise ModelError where the disk of `checkpoint`, which the output is beside, has too little room."""
    needed = disk_needed(shape, plan, recipe, formats, SIZES[dtype])
    nearest = next(parent for parent in checkpoint.parents if parent.exists())
    free = shutil.disk_usage(nearest).free
    if checkpoint.exists():
        free += sum(file.stat().st_size for file in checkpoint.iterdir())
    if needed > free:
        raise ModelError(
            f"fine-tuning into {', '.join(formats)} needs about {needed / 1e9:.1f} GB of disk for the model and its "
            f"checkpoints where {nearest} has {free / 1e9:.1f} GB free"
        )
