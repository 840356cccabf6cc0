"""Plans that may remove any query heads of a layer: a baseline that is measured with masks and never exported. Pure.

A plan (plan.py) keeps a rectangle of heads, `kv × q`, so that other programs can load the pruned layer. On a model with
grouped-query attention this is more restrictive than Wanda-sp, which removes the `int(rate × heads)` query heads with
the lowest scores, wherever they are. Comparing a search with a rectangular baseline alone would flatter the search.
This baseline has the same parameter budget:

- a removed query head frees its rows of q_proj and its columns of o_proj;
- a KV head counts as removed only when all its query heads are removed: until then its keys and values are needed;
- MLP channels use up the rest of the budget, as in every plan.

At high rates an MLP may have too few channels for that. A rectangular plan then removes more heads of the layer. This
plan removes channels of other layers instead, and raises BudgetError if those are too few.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import PositiveInt

from protocol.errors import BudgetError
from protocol.plans.plan import fill_channels
from protocol.plans.shape import ModelShape
from protocol.plans.value import Value

Heads = Literal["rectangular", "any"]
"""Which query heads may be removed: the same number from each remaining KV head, or any."""


class AnyHeadsLayer(Value):
    """Heads and channels that one layer keeps."""

    kept: tuple[tuple[bool, ...], ...]
    """Whether each query head is kept: [KV heads, query heads per KV head], in the dense layer's order."""
    mlp_channels: PositiveInt

    @property
    def query_heads(self) -> int:
        """Number of query heads kept."""
        return sum(map(sum, self.kept))

    @property
    def kv_heads(self) -> int:
        """Number of KV heads that at least one query head still uses."""
        return sum(map(any, self.kept))


class AnyHeadsPlan(Value):
    """Heads and channels that each layer keeps."""

    layers: tuple[AnyHeadsLayer, ...]

    def decoder_parameters(self, shape: ModelShape) -> int:
        """Return the decoder parameters that would be left if the masked pieces were removed."""
        return sum(
            shape.attention_parameters(layer.query_heads, layer.kv_heads) + shape.mlp_parameters(layer.mlp_channels)
            for layer in self.layers
        )


def make_any_heads_plan(
    rates: Sequence[float], scores: Sequence[Sequence[Sequence[float]]], shape: ModelShape, *, multiple_of: int = 1
) -> AnyHeadsPlan:
    """Return the plan that removes `rates`, one per layer, split equally between heads and MLP.

    `scores` are the importance scores of the query heads, [layers, KV heads, query heads per KV head]. If scores are
    equal, the first head is kept. Every layer keeps a head. Raises BudgetError if the MLPs are too small for the
    budget.
    """
    if not len(rates) == len(scores) == len(shape.layers):
        raise BudgetError(f"{len(rates)} pruning rates were given for {len(shape.layers)} layers")
    kept = [_strongest(each, rate) for each, rate in zip(scores, rates, strict=True)]
    wanted = []
    for i, (heads, rate) in enumerate(zip(kept, rates, strict=True)):
        whole = shape.layers[i]
        left = shape.attention_parameters(sum(map(sum, heads)), sum(map(any, heads)))
        removed = shape.attention_parameters(whole.query_heads, whole.kv_heads) - left
        wanted.append(rate * shape.layer_parameters(i) - removed)
    channels = fill_channels(shape, wanted, multiple_of)
    return AnyHeadsPlan(
        layers=tuple(AnyHeadsLayer(kept=heads, mlp_channels=count) for heads, count in zip(kept, channels, strict=True))
    )


def _strongest(scores: Sequence[Sequence[float]], rate: float) -> tuple[tuple[bool, ...], ...]:
    """Return which query heads are kept at `rate`: all but the `int(rate × heads)` with the lowest scores."""
    ranked = sorted(
        ((kv, q) for kv, group in enumerate(scores) for q in range(len(group))),
        key=lambda head: scores[head[0]][head[1]],
        reverse=True,
    )
    removed = min(int(rate * len(ranked) + 1e-9), len(ranked) - 1)
    kept = set(ranked[: len(ranked) - removed])
    return tuple(tuple((kv, q) in kept for q in range(len(group))) for kv, group in enumerate(scores))
