"""Plans that may remove any query heads of a layer: a baseline that is measured with masks and never exported. Pure.

A plan (plan.py) keeps a rectangle of heads, `kv × q`, so that other programs can load the pruned layer. On a
model with grouped-query attention that is harder than what Wanda-sp asks for, which removes the `int(rate × heads)`
query heads with the lowest scores, wherever they are. To compare a search with a rectangular baseline alone would
flatter the search, so this one stands beside it, with the same budget of parameters:

- a removed query head takes its rows of q_proj and its columns of o_proj;
- a KV head counts as removed only when all its query heads are, for until then its keys and values are needed;
- MLP channels fill what the heads leave of the budget, as in every plan.

At high rates an MLP may have too few channels for that. A rectangular plan then removes more heads of the layer. This
plan does not: channels of other layers go instead, and where those are too few there is a BudgetError.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from protocol.errors import BudgetError
from protocol.plans.plan import fill_channels
from protocol.plans.shape import ModelShape

Heads = Literal["rectangular", "any"]
"""Which query heads may be removed: as many of each KV head that stays, or any."""


class AnyHeadsLayer(BaseModel):
    """What one layer keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kept: tuple[tuple[bool, ...], ...]
    """Whether each query head stays: [KV heads, query heads per KV head], in the order of the dense layer."""
    mlp_channels: PositiveInt

    @property
    def query_heads(self) -> int:
        """Query heads kept."""
        return sum(map(sum, self.kept))

    @property
    def kv_heads(self) -> int:
        """KV heads that a query head still reads."""
        return sum(map(any, self.kept))


class AnyHeadsPlan(BaseModel):
    """What each layer of a model keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[AnyHeadsLayer, ...]

    def decoder_parameters(self, shape: ModelShape) -> int:
        """Decoder parameters that would be left if the masked pieces were removed."""
        return sum(
            shape.attention_parameters(layer.query_heads, layer.kv_heads) + shape.mlp_parameters(layer.mlp_channels)
            for layer in self.layers
        )


def make_any_heads_plan(
    rates: Sequence[float], scores: Sequence[Sequence[Sequence[float]]], shape: ModelShape, *, multiple_of: int = 1
) -> AnyHeadsPlan:
    """The plan that removes `rates`, one per layer, shared equally by heads and MLP.

    `scores` are those of the query heads, [layers, KV heads, query heads per KV head]; of equal ones the first stays.
    Every layer keeps a head. Raises BudgetError where the MLPs cannot fill the budget.
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
    """Which query heads stay at `rate`: all but the `int(rate × heads)` with the lowest scores."""
    ranked = sorted(
        ((kv, q) for kv, group in enumerate(scores) for q in range(len(group))),
        key=lambda head: scores[head[0]][head[1]],
        reverse=True,
    )
    removed = min(int(rate * len(ranked) + 1e-9), len(ranked) - 1)
    kept = set(ranked[: len(ranked) - removed])
    return tuple(tuple((kv, q) in kept for q in range(len(group))) for kv, group in enumerate(scores))
