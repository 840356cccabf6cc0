"""Pruning rates + model shape -> plan: how many heads and MLP channels each layer keeps. Pure.

Attention keeps a rectangle of heads, `kv × q`: kv KV heads with q query heads each, so that every pruned layer is a
valid grouped-query layer. Whole heads are coarse, so MLP channels use up the rest of the budget. The pruned model keeps
a share of (1 − β) of its decoder parameters, to within one channel (or `multiple_of` channels).
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import PositiveInt, field_validator

from protocol.errors import BudgetError
from protocol.plans.rates import DECIMALS, SCALE, feasible, project, weighted_mean
from protocol.plans.shape import Granularity, LayerShape, ModelShape, Unit
from protocol.plans.value import Value

Split = Literal["equal", "mlp-first"]
"""How a layer's rate is split: `equal` prunes heads and MLP at the same rate (the paper); `mlp-first` prunes heads only
once the MLP has reached MLP_FIRST_LIMIT."""

MLP_FIRST_LIMIT = 0.9
"""With `mlp-first`, the MLP rate above which heads are removed too."""


class LayerPlan(Value):
    """Heads and channels that one layer keeps."""

    kv_heads: PositiveInt
    queries_per_kv: PositiveInt
    mlp_channels: PositiveInt

    @property
    def query_heads(self) -> int:
        """Number of query heads kept."""
        return self.kv_heads * self.queries_per_kv


MOST_KNOWN_LAYERS = 100_000
_KNOWN_LAYERS: dict[tuple[int, int, int], LayerPlan] = {}


class Plan(Value):
    """Heads and channels that each layer keeps."""

    layers: tuple[LayerPlan, ...]

    @field_validator("layers", mode="after")
    @classmethod
    def _share(cls, layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
        """Reuse equal layer plans, because a search holds thousands of plans made of the same few layer plans."""
        if len(_KNOWN_LAYERS) > MOST_KNOWN_LAYERS:
            _KNOWN_LAYERS.clear()
        return tuple(
            _KNOWN_LAYERS.setdefault((layer.kv_heads, layer.queries_per_kv, layer.mlp_channels), layer)
            for layer in layers
        )

    def decoder_parameters(self, shape: ModelShape) -> int:
        """Return the decoder parameters left when the plan is applied to `shape`."""
        return sum(
            shape.attention_parameters(layer.query_heads, layer.kv_heads) + shape.mlp_parameters(layer.mlp_channels)
            for layer in self.layers
        )


class Parameters(Value):
    """Parameter counts before and after pruning."""

    decoder_before: int
    decoder_after: int
    total_before: int
    total_after: int


class AnyPlan(Protocol):
    """A Plan or an AnyHeadsPlan."""

    def decoder_parameters(self, shape: ModelShape) -> int:
        """Return the decoder parameters left of a model of this `shape`."""
        ...


def count_parameters(plan: AnyPlan, shape: ModelShape) -> Parameters:
    """Count the parameters of a model of this `shape` before and after `plan`."""
    after = plan.decoder_parameters(shape)
    return Parameters(
        decoder_before=shape.decoder_parameters,
        decoder_after=after,
        total_before=shape.total_parameters,
        total_after=after + shape.other_parameters,
    )


def removed_shares(plan: Plan, shape: ModelShape, granularity: Granularity) -> tuple[float, ...]:
    """Return the share of each unit's parameters that `plan` actually removes, after rounding to heads and channels."""
    shares: list[float] = []
    for kept, whole in zip(plan.layers, shape.layers, strict=True):
        before = (
            shape.attention_parameters(whole.query_heads, whole.kv_heads),
            shape.mlp_parameters(whole.mlp_channels),
        )
        after = (
            shape.attention_parameters(kept.query_heads, kept.kv_heads),
            shape.mlp_parameters(kept.mlp_channels),
        )
        if granularity == "layer":
            shares.append(1 - sum(after) / sum(before))
        else:
            shares += [1 - left / had for left, had in zip(after, before, strict=True)]
    return tuple(shares)


def dense_plan(shape: ModelShape) -> Plan:
    """Return the plan that removes nothing."""
    return Plan(
        layers=tuple(
            LayerPlan(kv_heads=s.kv_heads, queries_per_kv=s.queries_per_kv, mlp_channels=s.mlp_channels)
            for s in shape.layers
        )
    )


def unit_bounds(
    shape: ModelShape, granularity: Granularity, low: float = 0.0, high: float = 1.0
) -> tuple[tuple[float, float], ...]:
    """Return the lowest and highest pruning rate per unit: `low` and `high`, capped so that the unit still works."""
    bounds = []
    for unit in shape.units(granularity):
        highest = math.floor(unit.highest_rate * SCALE) / SCALE
        bounds.append((min(low, highest), round(min(high, highest), DECIMALS)))
    return tuple(bounds)


def feasible_rates(
    rates: Sequence[float],
    shape: ModelShape,
    mean: float,
    *,
    granularity: Granularity,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[float, ...]:
    """Return the feasible pruning rates nearest to `rates`: one per unit, five decimals, weighted mean `mean`."""
    weights = [unit.parameters for unit in shape.units(granularity)]
    return feasible(rates, weights, mean, unit_bounds(shape, granularity, low, high))


def check_rates(rates: Sequence[float], shape: ModelShape, mean: float, granularity: Granularity) -> None:
    """Raise BudgetError unless there is one rate for each unit and their weighted mean is `mean`, to within 1e-4."""
    units = shape.units(granularity)
    if len(rates) != len(units):
        raise BudgetError(f"{len(rates)} pruning rates were given for {len(units)} units ({granularity} granularity)")
    off = weighted_mean(rates, [unit.parameters for unit in units]) - mean
    if abs(off) > 1e-4:
        raise BudgetError(
            f"the pruning rates have a mean of {mean + off:.5f}, which is off the budget {mean} by {off:+.5f}"
        )


def make_plan(
    rates: Sequence[float],
    shape: ModelShape,
    *,
    granularity: Granularity = "layer",
    split: Split = "equal",
    multiple_of: int = 1,
) -> Plan:
    """Return the plan that removes `rates` (one per unit of `granularity`) from a model of this `shape`.

    At layer granularity, `split` divides a layer's rate between heads and MLP, and each layer meets its own budget. At
    block granularity, each attention block takes the choice of heads whose removed share is nearest to its rate. The
    difference that this rounding causes is spread evenly over the MLPs. Each MLP width differs from the dense width by
    a multiple of `multiple_of`. Raises BudgetError if the budget cannot be met.
    """
    units = shape.units(granularity)
    if len(rates) != len(units):
        raise BudgetError(f"{len(rates)} pruning rates were given for {len(units)} units ({granularity} granularity)")
    narrowest = min(layer.mlp_channels for layer in shape.layers)
    if multiple_of > narrowest:
        raise BudgetError(
            f"MLP widths cannot be multiples of {multiple_of}: the narrowest MLP has {narrowest} channels"
        )
    for unit, rate in zip(units, rates, strict=True):
        if not 0 <= rate < 1:
            raise BudgetError(f"the pruning rate of {unit.name} is {rate!r}, outside 0 ≤ rate < 1")
    removed = [rate * unit.parameters for rate, unit in zip(rates, units, strict=True)]
    if granularity == "layer":
        heads = [_layer_heads(shape, i, rate, split, multiple_of) for i, rate in enumerate(rates)]
        wanted = [removed[i] - _heads_removed(shape, i, heads[i]) for i in range(len(rates))]
    else:
        heads = _block_heads(shape, [rates[2 * i] for i in range(len(shape.layers))], sum(removed), multiple_of)
        wanted = _even_out(shape, heads, removed)
    channels = fill_channels(shape, wanted, multiple_of)
    return Plan(
        layers=tuple(
            LayerPlan(kv_heads=kv, queries_per_kv=q, mlp_channels=c) for (kv, q), c in zip(heads, channels, strict=True)
        )
    )


def head_options(layer: LayerShape) -> list[tuple[int, int]]:
    """Return all rectangular choices (KV heads kept, query heads kept in each) of a layer."""
    return [(kv, q) for kv in range(1, layer.kv_heads + 1) for q in range(1, layer.queries_per_kv + 1)]


def _heads_removed(shape: ModelShape, layer: int, heads: tuple[int, int]) -> int:
    kv, q = heads
    whole = shape.layers[layer]
    return shape.attention_parameters(whole.query_heads, whole.kv_heads) - shape.attention_parameters(kv * q, kv)


def heads_within(layer: LayerShape, rate: float) -> tuple[int, int]:
    """Return the heads kept at `rate`: the option that removes most query heads, but no more than Wanda-sp does.

    Wanda-sp removes `int(rate × heads)`. Among options that remove the same number, the option with more KV heads
    is taken, because a removed KV head costs all its query heads their keys and values. With multi-head attention the
    result equals Wanda-sp.
    """
    fewest = layer.query_heads - int(rate * layer.query_heads + 1e-9)
    within = [(kv, q) for kv, q in head_options(layer) if kv * q >= fewest]
    return min(within, key=lambda heads: (heads[0] * heads[1], -heads[0]))


def attention_levels(shape: ModelShape, layer: int) -> tuple[tuple[float, tuple[int, int]], ...]:
    """Return each share of an attention block's parameters that can be removed, ascending, with the heads then kept.

    Shares are rounded up to five decimals. Among options with the same number of query heads or the same share, the
    option with more KV heads is taken, as in `heads_within`.
    """
    whole = shape.layers[layer]
    parameters = shape.attention_parameters(whole.query_heads, whole.kv_heads)
    most_kv = {kv * q: (kv, q) for kv, q in head_options(whole)}  # in order of KV heads: the most stay
    levels: dict[float, tuple[int, int]] = {}
    for heads in sorted(most_kv.values(), reverse=True):
        share = math.ceil(_heads_removed(shape, layer, heads) / parameters * SCALE - 1e-6) / SCALE
        levels.setdefault(share, heads)
    return tuple(sorted(levels.items()))


def parameters_to_next_level(shape: ModelShape, unit: Unit, share: float, sign: int) -> int:
    """Return the parameters between `share` and the block's next level, up (`sign` 1) or down (−1); 0 at either end."""
    shares = [level for level, _ in attention_levels(shape, unit.layer)]
    following = min(range(len(shares)), key=lambda k: abs(shares[k] - share)) + sign
    return round(abs(shares[following] - share) * unit.parameters) if 0 <= following < len(shares) else 0


def heads_nearest(shape: ModelShape, layer: int, rate: float) -> tuple[int, int]:
    """Return the heads kept at an attention block's own `rate`: the option whose removed share is nearest.

    If two options are equally near, the option that keeps more heads is taken. A rate of zero keeps the whole block.
    """
    return min(attention_levels(shape, layer), key=lambda level: abs(level[0] - rate))[1]


def _layer_heads(shape: ModelShape, layer: int, rate: float, split: Split, multiple_of: int) -> tuple[int, int]:
    whole = shape.layers[layer]
    attention_rate = rate
    if split == "mlp-first":
        attention = shape.attention_parameters(whole.query_heads, whole.kv_heads)
        mlp = shape.mlp_parameters(whole.mlp_channels)
        attention_rate = max(0.0, rate * (attention + mlp) - MLP_FIRST_LIMIT * mlp) / attention
    heads = heads_within(whole, min(attention_rate, 1.0))
    # If the MLP is too small for the rest of the budget, more heads are removed.
    most = _most_channels(whole, multiple_of) * shape.channel_parameters
    target = rate * shape.layer_parameters(layer)
    if target - _heads_removed(shape, layer, heads) > most:
        enough = [h for h in head_options(whole) if _heads_removed(shape, layer, h) >= target - most]
        heads = min(enough, key=lambda h: _heads_removed(shape, layer, h), default=(1, 1))
    return heads


def _most_channels(layer: LayerShape, multiple_of: int) -> int:
    """Return how many channels an MLP can lose."""
    return layer.mlp_channels - _channel_choices(layer.mlp_channels, multiple_of)[0]


def _block_heads(shape: ModelShape, rates: Sequence[float], budget: float, multiple_of: int) -> list[tuple[int, int]]:
    """Return the heads kept at block granularity: those nearest to the rates, or fewer if the MLPs are too small.

    `budget` is the total number of parameters to remove. While the MLPs are too small for the rest of it, the layer
    that keeps the most heads relative to its rate gets its next smaller option.
    """
    heads = [heads_nearest(shape, i, rate) for i, rate in enumerate(rates)]
    most = sum(_most_channels(layer, multiple_of) for layer in shape.layers) * shape.channel_parameters
    while budget - sum(_heads_removed(shape, i, h) for i, h in enumerate(heads)) > most:
        smaller = {i: step for i, h in enumerate(heads) if (step := _next_smaller(shape, i, h)) is not None}
        if not smaller:
            break
        behind = max(smaller, key=lambda i: rates[i] - 1 + heads[i][0] * heads[i][1] / shape.layers[i].query_heads)
        heads[behind] = smaller[behind]
    return heads


def _next_smaller(shape: ModelShape, layer: int, heads: tuple[int, int]) -> tuple[int, int] | None:
    """Return the largest head option smaller than `heads`; None if there is none."""
    lost = _heads_removed(shape, layer, heads)
    more = [h for h in head_options(shape.layers[layer]) if _heads_removed(shape, layer, h) > lost]
    return min(more, key=lambda h: (_heads_removed(shape, layer, h), -h[0]), default=None)


def _even_out(shape: ModelShape, heads: Sequence[tuple[int, int]], removed: Sequence[float]) -> list[float]:
    """Return the MLP parameters to remove per layer, with the heads' rounding spread evenly over all MLPs."""
    total = sum(removed) - sum(_heads_removed(shape, i, h) for i, h in enumerate(heads))
    sizes = [s.mlp_channels * shape.channel_parameters for s in shape.layers]
    rates = [removed[2 * i + 1] / size for i, size in enumerate(sizes)]
    bounds = [(0.0, 1 - shape.channel_parameters / size) for size in sizes]
    spread = project(rates, sizes, total / sum(sizes), bounds)
    return [rate * size for rate, size in zip(spread, sizes, strict=True)]


def fill_channels(shape: ModelShape, wanted: Sequence[float], multiple_of: int) -> list[int]:
    """Return the channels kept per layer when `wanted` MLP parameters are removed.

    The rounding error of a layer is carried over to the next layer. The error that remains at the end is given to any
    layer with room. Raises BudgetError if no layer has room.
    """
    quantum = multiple_of * shape.channel_parameters
    kept, carry = [], 0.0
    for layer, target in zip(shape.layers, wanted, strict=True):
        allowed = _channel_choices(layer.mlp_channels, multiple_of)
        ideal = layer.mlp_channels - (target + carry) / shape.channel_parameters
        # The nearest width is one of the two around the ideal. To compare all takes seconds per plan of a 70B model.
        below = min(max(math.floor((ideal - allowed.start) / multiple_of), 0), len(allowed) - 1)
        choice = min(allowed[below : below + 2], key=lambda channels: (abs(channels - ideal), -channels))
        kept.append(choice)
        carry += target - (layer.mlp_channels - choice) * shape.channel_parameters
    for i, layer in enumerate(shape.layers):
        while abs(carry) > quantum / 2:
            step = -multiple_of if carry > 0 else multiple_of
            if kept[i] + step not in _channel_choices(layer.mlp_channels, multiple_of):
                break
            kept[i] += step
            carry += step * shape.channel_parameters
    if abs(carry) > quantum:
        raise BudgetError(
            f"the plan misses its budget by {abs(carry):.0f} parameters: no MLP has room "
            f"for them in multiples of {multiple_of} channels"
        )
    return kept


def _channel_choices(channels: int, multiple_of: int) -> range:
    """Return the allowed widths of an MLP, which differ from the dense width by a multiple of `multiple_of`."""
    rest = channels % multiple_of
    return range(rest or multiple_of, channels + 1, multiple_of)
