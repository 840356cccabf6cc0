"""The weights of a checkpoint by their names in transformers, built when their shard is written.

A pruned model's weights are views, some of them transposed, and some families fuse projections in one tensor. Building
each tensor only for its shard limits an export's memory to that of one shard.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from gpu_worker.models.families import Family, family_of
from gpu_worker.models.loading import LoadedModel
from gpu_worker.progress import Progress, no_progress

SHARD_SIZE = 5 * 10**9


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint: its shape and dtype, and a function that builds it."""

    like: Tensor
    """Shape and dtype, as a tensor on the meta device."""
    make: Callable[[], Tensor]


def stored_weight(tensor: Tensor) -> Weight:
    """Return the weight for a tensor that is stored unchanged."""
    return Weight(like=tensor.to("meta"), make=lambda: tensor)


ProjectionWeight = Callable[[int, str, str], Weight]
"""(layer index, projection such as `query`, `weight` or `bias`) -> the projection's weight in the checkpoint."""


def checkpoint_weights(model: LoadedModel, projection: ProjectionWeight) -> dict[str, Weight]:
    """Return all weights of the checkpoint by name; `projection` returns the weights of the pruned projections.

    As in transformers, an output head that is tied to the embedding is omitted.
    """
    family = family_of(model.causal_lm.config)
    pruned = {id(p) for layer in model.decoder.layers for linear in layer.linears for p in linear.parameters()}
    tied = f"{family.head}.weight" if model.causal_lm.config.tie_word_embeddings else None
    weights = {
        name: stored_weight(tensor.detach())
        for name, tensor in model.causal_lm.state_dict(keep_vars=True).items()
        if id(tensor) not in pruned and name != tied
    }
    for i, layer in enumerate(model.decoder.layers):
        for path, parts in _layout(family).items():
            for kind in _kinds(getattr(layer, parts[0])):
                joined = _joined([projection(i, part, kind) for part in parts])
                weights[f"{family.layers}.{i}.{path}.{kind}"] = joined
    return weights


def save_weights(weights: dict[str, Weight], folder: Path, progress: Progress = no_progress) -> None:
    """Write safetensors into `folder`: one file, or shards of at most 5 GB with an index."""
    split = split_torch_state_dict_into_shards({n: w.like for n, w in weights.items()}, max_shard_size=SHARD_SIZE)
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            progress("writing", done, len(weights))
            shard[name] = weights[name].make().cpu().contiguous()
            done += 1
        save_file(shard, folder / file, metadata={"format": "pt"})
    progress("writing", done, len(weights))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _layout(family: Family) -> dict[str, tuple[str, ...]]:
    """Return the projections of a decoder layer by the path of the dense linear layer that contains them."""
    layout: dict[str, tuple[str, ...]] = {family.output: ("output",), family.down: ("down",)}
    if family.fused_attention is None:
        layout |= {family.query: ("query",), family.key: ("key",), family.value: ("value",)}
    else:
        layout[family.fused_attention] = ("query", "key", "value")
    if family.fused_mlp is None:
        layout |= {family.gate: ("gate",), family.up: ("up",)}
    else:
        layout[family.fused_mlp] = ("gate", "up")
    return layout


def _kinds(linear: nn.Linear) -> tuple[str, ...]:
    return ("weight",) if linear.bias is None else ("weight", "bias")


def _joined(parts: Sequence[Weight]) -> Weight:
    """Concatenate the rows of projections that a family fuses in one tensor."""
    if len(parts) == 1:
        return parts[0]
    return Weight(
        like=torch.cat([part.like for part in parts]), make=lambda: torch.cat([part.make() for part in parts])
    )
