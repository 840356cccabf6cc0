"""Pruning of a single unit, by which sensitivity is measured: its plan, and the share that it removes. Pure."""

from protocol.plans.plan import LayerPlan, Plan, attention_levels, dense_plan, heads_nearest, make_plan
from protocol.plans.shape import ModelShape, Unit
from protocol.plans.spec import SearchSpec


def single_unit_plan(unit: Unit, spec: SearchSpec, shape: ModelShape) -> LayerPlan:
    """Return the plan of the unit's layer when only this unit is pruned, at the spec's rate or the unit's highest rate.

    A layer is pruned with the spec's split, and an MLP loses the rate's share of its channels. Attention keeps the
    rectangle of heads nearest to the rate, and loses at least its smallest removable piece. Otherwise a low rate would
    leave the block whole. Its sensitivity would then be zero, as if it could be pruned without harm.
    """
    rate = min(spec.rate, unit.highest_rate)
    whole = dense_plan(shape).layers[unit.layer]
    if unit.kind == "layer":
        rates = [rate if i == unit.layer else 0.0 for i in range(len(shape.layers))]
        kept = make_plan(rates, shape, split=spec.split, multiple_of=spec.multiple_of).layers[unit.layer]
        return kept if kept != whole else _fewer_channels(whole, spec.multiple_of)
    if unit.kind == "mlp":
        return _fewer_channels(whole, max(1, round(rate * whole.mlp_channels)))
    kv, each = heads_nearest(shape, unit.layer, rate)
    if kv * each == whole.query_heads:
        kv, each = _smallest_removal(shape, unit)
    return whole.model_copy(update={"kv_heads": kv, "queries_per_kv": each})


def _fewer_channels(whole: LayerPlan, count: int) -> LayerPlan:
    """Return the layer without `count` channels; at least one channel is kept."""
    return whole.model_copy(update={"mlp_channels": max(1, whole.mlp_channels - count)})


def single_unit_removed_share(unit: Unit, spec: SearchSpec, shape: ModelShape) -> float:
    """Return the share of the unit's parameters that `single_unit_plan` removes."""
    whole, kept = dense_plan(shape), single_unit_plan(unit, spec, shape)
    layers = [kept if i == unit.layer else layer for i, layer in enumerate(whole.layers)]
    left = Plan(layers=tuple(layers)).decoder_parameters(shape)
    return (shape.decoder_parameters - left) / unit.parameters


def _smallest_removal(shape: ModelShape, unit: Unit) -> tuple[int, int]:
    """Return the heads kept by the smallest possible removal; all of them if there is only one head."""
    levels = attention_levels(shape, unit.layer)
    return levels[min(1, len(levels) - 1)][1]
