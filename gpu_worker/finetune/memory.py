"""How much memory and disk fine-tuning takes, known before any weight is loaded."""

from dataclasses import dataclass
from pathlib import Path

from gpu_worker.export.disk_space import check_disk, export_bytes
from protocol.errors import ModelError
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Dtype
from protocol.results.finetuning import Recipe
from protocol.results.formats import Formats, GgufType

FP32 = 4
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


def check_finetuning_disk(
    shape: ModelShape,
    kept: int,
    recipe: Recipe,
    formats: Formats,
    dtype: Dtype,
    checkpoint: Path,
    gguf_type: GgufType = "f16",
    beside: int = 0,
) -> None:
    """Raise ModelError where the disk of `checkpoint`, which the output is beside, has too little room.

    For a model in all `formats`, and for two checkpoints: one is there until the next is whole. `shape` is the dense
    model's, of which `kept` parameters of the decoder stay. `beside` are bytes that the pruned model will take there.
    """
    if checkpoint.exists() and not checkpoint.is_dir():
        raise ModelError(f"{checkpoint}, the folder of checkpoints, is a file; move it, or pass another --out")
    checkpoints = 2 * Training(recipe).parameters(shape) * IN_CHECKPOINT
    needed = export_bytes(shape, kept, formats, dtype, gguf_type) + checkpoints + beside
    there = sum(file.stat().st_size for file in checkpoint.iterdir()) if checkpoint.exists() else 0
    what = f"fine-tuning into {', '.join(formats)}, with its checkpoints{' and what it begins from' if beside else ''},"
    check_disk(checkpoint, needed, what, freed=there)
