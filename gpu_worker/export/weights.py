"""The weights of a checkpoint, by the names that transformers gives them, made when their shard is written.

A pruned model's weights are views, some of them transposed, and a family may keep several projections in one tensor.
Making each tensor only for its shard keeps the memory that an export needs below that of one shard.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from gpu_worker.export.modeling import modeling_of
from gpu_worker.models import LoadedModel

SHARD_SIZE = "5GB"

_SEPARATE = {
    "self_attn.q_proj": ("query",),
    "self_attn.k_proj": ("key",),
    "self_attn.v_proj": ("value",),
    "self_attn.o_proj": ("output",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
}
_FUSED = {
    "self_attn.qkv_proj": ("query", "key", "value"),
    "self_attn.o_proj": ("output",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
}


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint: how large it is, and how to get it."""

    like: Tensor
    """On the meta device: shape and type without content."""
    make: Callable[[], Tensor]


def as_it_is(tensor: Tensor) -> Weight:
    """The weight that is this tensor."""
    return Weight(like=tensor.to("meta"), make=lambda: tensor)


ProjectionWeight = Callable[[int, str, str], Weight]
"""(layer index, projection such as `query`, `weight` or `bias`) -> what the checkpoint holds of it."""


def checkpoint_weights(model: LoadedModel, projection: ProjectionWeight) -> dict[str, Weight]:
    """All weights of the checkpoint by name; those of the pruned projections are what `projection` says.

    An output head that is tied to the embedding is left out, as transformers leaves it out.
    """
    layers = model.decoder.layers
    pruned = {id(p) for layer in layers for name in _names() for p in getattr(layer, name).parameters()}
    head = id(model.decoder.head.weight) if model.causal_lm.config.tie_word_embeddings else None
    weights = {
        name: as_it_is(tensor.detach())
        for name, tensor in model.causal_lm.state_dict(keep_vars=True).items()
        if id(tensor) not in pruned and not (id(tensor) == head and name.startswith("lm_head"))
    }
    layout = _FUSED if modeling_of(model.causal_lm.config.model_type).fused else _SEPARATE
    for i, layer in enumerate(layers):
        for path, parts in layout.items():
            for kind in _kinds(getattr(layer, parts[0])):
                weights[f"model.layers.{i}.{path}.{kind}"] = _joined([projection(i, part, kind) for part in parts])
    return weights


def save_weights(weights: dict[str, Weight], folder: Path) -> None:
    """Write safetensors into `folder`: one file, or shards of at most 5 GB and an index."""
    split = split_torch_state_dict_into_shards({n: w.like for n, w in weights.items()}, max_shard_size=SHARD_SIZE)
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights[name].make().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _names() -> tuple[str, ...]:
    return tuple(name for parts in _SEPARATE.values() for name in parts)


def _kinds(linear: nn.Linear) -> tuple[str, ...]:
    return ("weight",) if linear.bias is None else ("weight", "bias")


def _joined(parts: Sequence[Weight]) -> Weight:
    """Several projections as the one tensor that a family keeps them in: one below the other."""
    if len(parts) == 1:
        return parts[0]
    return Weight(
        like=torch.cat([part.like for part in parts]), make=lambda: torch.cat([part.make() for part in parts])
    )
