"""A unit that is pruned alone: what its layer keeps, and the share that goes. How sensitivity is measured. Pure."""

from protocol.plans.plan import LayerPlan, Plan, attention_levels, dense_plan, heads_nearest, make_plan
from protocol.plans.shape import ModelShape, Unit
from protocol.plans.spec import SearchSpec


def pruned_alone(unit: Unit, spec: SearchSpec, shape: ModelShape) -> LayerPlan:
    """What the unit's layer keeps when this unit alone loses the spec's rate, or as much as leaves it working.

    A layer is pruned with the spec's split; an MLP loses the rate's share of its channels; attention takes the
    rectangular shape that the rate allows, and loses at least its smallest removable piece: at a low rate that shape
    would be the whole block, and a sensitivity of zero would say that it may be pruned for nothing.
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
    """The layer without `count` channels, or with the one that has to stay."""
    return whole.model_copy(update={"mlp_channels": max(1, whole.mlp_channels - count)})


def removed_alone(unit: Unit, spec: SearchSpec, shape: ModelShape) -> float:
    """The share of the unit's parameters that `pruned_alone` removes."""
    whole, kept = dense_plan(shape), pruned_alone(unit, spec, shape)
    layers = [kept if i == unit.layer else layer for i, layer in enumerate(whole.layers)]
    left = Plan(layers=tuple(layers)).decoder_parameters(shape)
    return (shape.decoder_parameters - left) / unit.parameters


def _smallest_removal(shape: ModelShape, unit: Unit) -> tuple[int, int]:
    """The attention shape that loses least; the whole one where there is but one head."""
    levels = attention_levels(shape, unit.layer)
    return levels[min(1, len(levels) - 1)][1]
