"""Writes the format `padded`: the dense architecture and sizes, with zeros in place of removed weights.

It loads wherever the dense model does, without custom code, and computes the same as the pruned model. It saves neither
memory nor time. It is for programs that support neither sizes per layer nor GGUF, and for comparisons.
"""

from pathlib import Path

from torch import Tensor

from gpu_worker.export.auxiliary_files import dense_config, write_auxiliary_files, write_json
from gpu_worker.export.weights import Weight, checkpoint_weights, save_weights
from gpu_worker.models.loading import LoadedModel
from gpu_worker.models.modeling import dense_type, modeling_of
from gpu_worker.progress import Progress, no_progress
from protocol.plans.plan import LayerPlan, Plan
from protocol.plans.shape import LayerShape

_COLUMNS = ("output", "down")
"""Projections that lose columns. The other projections lose rows and the biases of these rows."""


def write_padded(model: LoadedModel, plan: Plan, folder: Path, progress: Progress = no_progress) -> None:
    """Write `model`, pruned to `plan`, into the empty `folder`. Raises ModelError for an unsupported family."""
    modeling_of(dense_type(model.causal_lm.config), "padded")
    config = dense_config(model)
    whole = LayerShape(
        query_heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        mlp_channels=config["intermediate_size"],
    )
    write_json(folder / "config.json", config)
    save_weights(checkpoint_weights(model, lambda *place: _padded(model, plan, whole, *place)), folder, progress)
    write_auxiliary_files(model, folder)


def _padded(model: LoadedModel, plan: Plan, shape: LayerShape, layer: int, projection: str, kind: str) -> Weight:
    """Return a projection's parameter, zero-padded to its dense size."""
    tensor: Tensor = getattr(getattr(model.decoder.layers[layer], projection), kind).detach()
    kept, whole = _pieces(projection, plan.layers[layer], shape)

    def spread(like: Tensor) -> Tensor:
        if projection not in _COLUMNS:
            return _spread(like, kept, whole)
        return like if kind == "bias" else _spread(like.t(), kept, whole).t()

    return Weight(like=spread(tensor.to("meta")), make=lambda: spread(tensor))


def _pieces(projection: str, plan: LayerPlan, shape: LayerShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a projection's numbers of heads or channels, first in the pruned and then in the dense model."""
    if projection in ("query", "output"):
        return (plan.kv_heads, plan.queries_per_kv), (shape.kv_heads, shape.queries_per_kv)
    if projection in ("key", "value"):
        return (plan.kv_heads,), (shape.kv_heads,)
    return (plan.mlp_channels,), (shape.mlp_channels,)


def _spread(rows: Tensor, kept: tuple[int, ...], whole: tuple[int, ...]) -> Tensor:
    """Zero-pad the rows of the kept pieces at the end of each dimension of `whole`.

    A query head thus stays with its KV head: if two of three query heads are kept in each group, each third query head
    is zero.
    """
    pieces = rows.reshape(*kept, -1, *rows.shape[1:])
    full = pieces.new_zeros(*whole, *pieces.shape[len(kept) :])
    full[tuple(slice(count) for count in kept)] = pieces
    return full.flatten(0, len(kept))
