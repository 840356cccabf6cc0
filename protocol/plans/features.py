"""Features: what is known about each unit before anything is pruned, as numbers that rules compute with. Pure.

`KNOWN` follow from the model's shape. `MEASURED` come from calibration: a worker measures them raw, and they are
compared within their kind (attention with attention, MLP with MLP). A measured feature is the logarithm of the raw
value, standardised to mean 0 and standard deviation 1 among the units of its kind. So a rule that was found on one
model has a meaning on another.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from protocol.plans.budget import sensitivity_rates
from protocol.plans.shape import Granularity, ModelShape, Unit

KNOWN = {
    "rate": "target pruning rate β",
    "attention": "1 for an attention block, otherwise 0",
    "mlp": "1 for an MLP block, otherwise 0",
    "depth": "0 for the first layer to 1 for the last",
    "first": "1 in the first layer, otherwise 0",
    "last": "1 in the last layer, otherwise 0",
    "size": "parameters of the unit, divided by the mean of all units",
}
MEASURED = {
    "sensitivity": "KL(dense ‖ pruned) when only this unit is pruned, by β",
    "outliers": "share of outliers in the layer (OWL, Yin et al., 2024)",
    "influence": "1 − cosine of the layer's input and output (block influence, ShortGPT, Men et al., 2024)",
    "fit_error": "share of the output's energy that the least-squares fit loses when the unit is pruned by β",
    "lost_score": "share of the importance scores that pruning by β removes",
    "weight": "mean |W| of the projections",
}
DERIVED = {
    "least_damage": "rate with the least damage if no unit affected another: a good start (allocation `sensitivity`)"
}
FEATURES = KNOWN | MEASURED | DERIVED
SMALLEST = 1e-9
"""Raw values count as at least this."""

RawFeatures = Mapping[str, Sequence[float]]
"""The measured features as they were measured, with one value per unit, and `removed`: the share of each unit that was
removed to measure its sensitivity. Some may be missing."""


def raw_features(
    units: Sequence[Unit],
    *,
    sensitivity: Sequence[float],
    removed: Sequence[float],
    outliers: Sequence[float],
    others: RawFeatures,
) -> dict[str, Sequence[float]]:
    """Return the measured features; `outliers` are per layer, the rest per unit. Empty ones were not measured."""
    by_unit = [outliers[unit.layer] for unit in units if outliers]
    found = {**others, "sensitivity": sensitivity, "removed": removed, "outliers": by_unit}
    return {name: values for name, values in found.items() if values}


def unit_features(
    shape: ModelShape, rate: float, granularity: Granularity, measured: RawFeatures
) -> dict[str, tuple[float, ...]]:
    """Return the features that are known, each with one value per unit."""
    units = shape.units(granularity)
    last = len(shape.layers) - 1
    mean_size = statistics.fmean(unit.parameters for unit in units)
    known = {
        "rate": [rate] * len(units),
        "attention": [float(unit.kind == "attention") for unit in units],
        # A whole layer, which is mostly MLP, counts as an MLP. Prompts then do not name this feature.
        "mlp": [float(unit.kind != "attention") for unit in units],
        "depth": [unit.layer / max(1, last) for unit in units],
        "first": [float(unit.layer == 0) for unit in units],
        "last": [float(unit.layer == last) for unit in units],
        "size": [unit.parameters / mean_size for unit in units],
    }
    compared = {name: _standardised(raw, units) for name, raw in measured.items() if name in MEASURED}
    derived = {}
    if {"sensitivity", "removed"} <= measured.keys():
        found = sensitivity_rates(measured["sensitivity"], measured["removed"], shape, rate, granularity)
        derived["least_damage"] = list(found)
    return {name: tuple(values) for name, values in (known | compared | derived).items()}


def _standardised(raw: Sequence[float], units: Sequence[Unit]) -> list[float]:
    """Return log(raw), standardised within each kind; 0 where all units of the kind are equal."""
    logs = [math.log(max(value, SMALLEST)) for value in raw]
    found = [0.0] * len(logs)
    for kind in {unit.kind for unit in units}:
        where = [i for i, unit in enumerate(units) if unit.kind == kind]
        mean, spread = statistics.fmean(logs[i] for i in where), statistics.pstdev([logs[i] for i in where])
        for i in where:
            found[i] = (logs[i] - mean) / spread if spread > SMALLEST else 0.0
    return found
