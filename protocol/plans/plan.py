"""Pruning rates + model shape -> plan: how many heads and MLP channels each layer keeps. Pure.

What attention keeps is rectangular, `kv × q`: so many KV heads, and so many query heads in each, so that every pruned
layer is a valid grouped-query layer. Whole heads are coarse; MLP channels fill what they leave of the budget, and the
whole model ends within one channel (or one `multiple_of` of channels) of (1 − β) of its decoder parameters.
"""

import math
from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, PositiveInt, field_validator

from protocol.errors import BudgetError
from protocol.plans.rates import DECIMALS, SCALE, feasible, project, weighted_mean
from protocol.plans.shape import Granularity, LayerShape, ModelShape, Unit

Split = Literal["equal", "mlp-first"]
"""How a layer's rate is shared: the same rate for heads and MLP (the paper), or heads only when the MLP is used up."""

MLP_FIRST_LIMIT = 0.9
"""With `mlp-first`, the MLP rate from which on heads are removed too."""


class LayerPlan(BaseModel):
    """What one layer keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_heads: PositiveInt
    queries_per_kv: PositiveInt
    mlp_channels: PositiveInt

    @property
    def query_heads(self) -> int:
        """Query heads kept."""
        return self.kv_heads * self.queries_per_kv


MOST_KNOWN_LAYERS = 100_000
_KNOWN_LAYERS: dict[tuple[int, int, int], LayerPlan] = {}


class Plan(BaseModel):
    """What each layer of a model keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[LayerPlan, ...]

    @field_validator("layers", mode="after")
    @classmethod
    def _share(cls, layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
        """A search holds thousands of plans of the same few layers; equal ones are one object."""
        if len(_KNOWN_LAYERS) > MOST_KNOWN_LAYERS:
            _KNOWN_LAYERS.clear()
        return tuple(
            _KNOWN_LAYERS.setdefault((layer.kv_heads, layer.queries_per_kv, layer.mlp_channels), layer)
            for layer in layers
        )

    def decoder_parameters(self, shape: ModelShape) -> int:
        """Decoder parameters left when the plan is applied to `shape`."""
        return sum(
            shape.attention_parameters(layer.query_heads, layer.kv_heads) + shape.mlp_parameters(layer.mlp_channels)
            for layer in self.layers
        )


class Parameters(BaseModel):
    """Parameter counts before and after pruning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoder_before: int
    decoder_after: int
    total_before: int
    total_after: int


class Counted(Protocol):
    """What says how many parameters it leaves, such as a plan."""

    def decoder_parameters(self, shape: ModelShape) -> int:
        """Decoder parameters left of a model of this `shape`."""
        ...


def count_parameters(plan: Counted, shape: ModelShape) -> Parameters:
    """What `plan` leaves of a model of this `shape`."""
    after = plan.decoder_parameters(shape)
    return Parameters(
        decoder_before=shape.decoder_parameters,
        decoder_after=after,
        total_before=shape.total_parameters,
        total_after=after + shape.other_parameters,
    )


def removed_shares(plan: Plan, shape: ModelShape, granularity: Granularity) -> tuple[float, ...]:
    """What `plan` really removes of each unit, as shares of its parameters."""
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
    """The plan that removes nothing."""
    return Plan(
        layers=tuple(
            LayerPlan(kv_heads=s.kv_heads, queries_per_kv=s.queries_per_kv, mlp_channels=s.mlp_channels)
            for s in shape.layers
        )
    )


def unit_bounds(
    shape: ModelShape, granularity: Granularity, low: float = 0.0, high: float = 1.0
) -> tuple[tuple[float, float], ...]:
    """Per unit, the lowest and highest pruning rate: `low` and `high`, and no more than leaves a working unit."""
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
    """The feasible pruning rates nearest to `rates`: one per unit, five decimals, weighted mean exactly `mean`."""
    weights = [unit.parameters for unit in shape.units(granularity)]
    return feasible(rates, weights, mean, unit_bounds(shape, granularity, low, high))


def check_rates(
    rates: Sequence[float], shape: ModelShape, mean: float, granularity: Granularity, tolerance: float = 1e-4
) -> None:
    """Raise BudgetError unless there is one rate for each unit and their weighted mean is `mean`."""
    units = shape.units(granularity)
    if len(rates) != len(units):
        raise BudgetError(f"{len(rates)} pruning rates were given for {len(units)} units ({granularity} granularity)")
    off = weighted_mean(rates, [unit.parameters for unit in units]) - mean
    if abs(off) > tolerance:
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
    """The plan that removes `rates` (one per unit of `granularity`) from a model of this `shape`.

    At layer granularity `split` shares a layer's rate between heads and MLP and each layer keeps to its own budget.
    At block granularity attention takes the number of heads whose share is nearest to its rate, and what that leaves
    of the whole budget is spread evenly over the MLPs, so that no single MLP pays for its neighbour's rounding. MLP
    widths are multiples of `multiple_of` (where the layer has that many channels). Raises BudgetError where the budget
    cannot be met.
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
    """All rectangular choices (KV heads kept, query heads kept in each) of a layer."""
    return [(kv, q) for kv in range(1, layer.kv_heads + 1) for q in range(1, layer.queries_per_kv + 1)]


def _heads_removed(shape: ModelShape, layer: int, heads: tuple[int, int]) -> int:
    kv, q = heads
    whole = shape.layers[layer]
    return shape.attention_parameters(whole.query_heads, whole.kv_heads) - shape.attention_parameters(kv * q, kv)


def heads_within(layer: LayerShape, rate: float) -> tuple[int, int]:
    """What attention keeps at `rate`: the option that removes most query heads, but no more than Wanda-sp does.

    Wanda-sp removes `int(rate × heads)`, rounded down. Of options that remove as many, the one with more KV heads: a
    lost KV head takes the keys and values of all its query heads along. With multi-head attention this is Wanda-sp.
    """
    fewest = layer.query_heads - int(rate * layer.query_heads + 1e-9)
    within = [(kv, q) for kv, q in head_options(layer) if kv * q >= fewest]
    return min(within, key=lambda heads: (heads[0] * heads[1], -heads[0]))


def attention_levels(shape: ModelShape, layer: int) -> tuple[tuple[float, tuple[int, int]], ...]:
    """What an attention block can lose, the least first: shares of its parameters, and the heads that then stay.

    Shares are rounded up to five decimals. Of options with as many query heads, or of the same share, the one with more
    KV heads, as in `heads_within`: to lose a KV head is worst.
    """
    whole = shape.layers[layer]
    parameters = shape.attention_parameters(whole.query_heads, whole.kv_heads)
    most_kv = {kv * q: (kv, q) for kv, q in head_options(whole)}  # in order of KV heads: the last one stays
    levels: dict[float, tuple[int, int]] = {}
    for heads in sorted(most_kv.values(), reverse=True):
        share = math.ceil(_heads_removed(shape, layer, heads) / parameters * SCALE - 1e-6) / SCALE
        levels.setdefault(share, heads)
    return tuple(sorted(levels.items()))


def parameters_to_next_level(shape: ModelShape, unit: Unit, share: float, sign: int) -> int:
    """Parameters from where an attention block is to its next level, up (`sign` 1) or down (−1); 0 at either end."""
    shares = [level for level, _ in attention_levels(shape, unit.layer)]
    following = min(range(len(shares)), key=lambda k: abs(shares[k] - share)) + sign
    return round(abs(shares[following] - share) * unit.parameters) if 0 <= following < len(shares) else 0


def heads_nearest(shape: ModelShape, layer: int, rate: float) -> tuple[int, int]:
    """What attention keeps at `rate` where its rate is its own: the option whose share is nearest; of two, the larger.

    A rate of nought is the whole block, and each level's own share is that level.
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
    # The MLP has to be able to take what the heads leave; where it cannot, more heads go.
    most = _most_channels(whole, multiple_of) * shape.channel_parameters
    target = rate * shape.layer_parameters(layer)
    if target - _heads_removed(shape, layer, heads) > most:
        enough = [h for h in head_options(whole) if _heads_removed(shape, layer, h) >= target - most]
        heads = min(enough, key=lambda h: _heads_removed(shape, layer, h), default=(1, 1))
    return heads


def _most_channels(layer: LayerShape, multiple_of: int) -> int:
    """How many channels an MLP can lose."""
    return layer.mlp_channels - _channel_choices(layer.mlp_channels, multiple_of)[0]


def _block_heads(shape: ModelShape, rates: Sequence[float], budget: float, multiple_of: int) -> list[tuple[int, int]]:
    """Heads kept at block granularity: those nearest to the rates, and fewer where the MLPs cannot give the rest.

    `budget` is what has to go in all, in parameters. Then the layer loses its next piece whose heads are furthest from
    its rate.
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
    """The head option that loses least more than `heads` do; None where nothing is left to lose."""
    lost = _heads_removed(shape, layer, heads)
    more = [h for h in head_options(shape.layers[layer]) if _heads_removed(shape, layer, h) > lost]
    return min(more, key=lambda h: (_heads_removed(shape, layer, h), -h[0]), default=None)


def _even_out(shape: ModelShape, heads: Sequence[tuple[int, int]], removed: Sequence[float]) -> list[float]:
    """Block granularity: MLP parameters to remove per layer, the heads' rounding spread evenly over all MLPs."""
    total = sum(removed) - sum(_heads_removed(shape, i, h) for i, h in enumerate(heads))
    sizes = [s.mlp_channels * shape.channel_parameters for s in shape.layers]
    rates = [removed[2 * i + 1] / size for i, size in enumerate(sizes)]
    bounds = [(0.0, 1 - shape.channel_parameters / size) for size in sizes]
    spread = project(rates, sizes, total / sum(sizes), bounds)
    return [rate * size for rate, size in zip(spread, sizes, strict=True)]


def fill_channels(shape: ModelShape, wanted: Sequence[float], multiple_of: int) -> list[int]:
    """Channels kept per layer when `wanted` MLP parameters go, each layer passing its rounding on to the next.

    What a layer cannot give (or take) is carried along, and settled at the end by any layer that has room.
    """
    quantum = multiple_of * shape.channel_parameters
    kept, carry = [], 0.0
    for layer, target in zip(shape.layers, wanted, strict=True):
        allowed = _channel_choices(layer.mlp_channels, multiple_of)
        ideal = layer.mlp_channels - (target + carry) / shape.channel_parameters
        choice = min(allowed, key=lambda channels: (abs(channels - ideal), -channels))
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
    """Widths an MLP may keep. One that is no multiple itself keeps the rest, so that dense stays dense."""
    rest = channels % multiple_of
    return range(rest or multiple_of, channels + 1, multiple_of)
