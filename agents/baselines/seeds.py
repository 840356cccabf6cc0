"""Seeds: allocations without search that join the first population, so that the search begins with the best of them."""

from collections.abc import Sequence

import structlog

from agents.population.view import Refused, Submit, View
from protocol.errors import BudgetError, RuleError
from protocol.plans.allocation import Allocation, DenseMeasurements, allocation_rates
from protocol.plans.candidate import Provenance
from protocol.plans.plan import MLP_FIRST_LIMIT
from protocol.plans.shape import ModelShape, Unit

log = structlog.get_logger()


async def submit_seeds(seeds: Sequence[Allocation], view: View, submit: Submit) -> None:
    """Submit the rates of each allocation; skip those that cannot reach the pruning rate or give a known plan."""
    for index, seed in enumerate(seeds):
        if ("seed", index) in view.made:  # by an earlier process; a file with a rule may have changed since
            continue
        rule = str(seed.rule) if seed.method == "rule" else None
        provenance = Provenance(agent="seed", source="allocation", round=0, call=index, rule=rule)
        try:
            result = await submit(seed_rates(seed, view), provenance)
        except (BudgetError, RuleError) as error:
            result = Refused(str(error))
        if isinstance(result, Refused):
            log.info("seed_left_out", method=rule or seed.method, reason=result.reason)


def seed_rates(seed: Allocation, view: View) -> tuple[float, ...]:
    """Return the rates of an allocation, computed from the model profile.

    Rules and `sensitivity` give a rate per unit. The other methods give one rate per layer and do not split it between
    attention and MLP. At block granularity, the MLP then takes as much of that rate as possible, because removing heads
    in every layer does the most damage. Raise BudgetError if the method cannot reach the pruning rate, or if the
    profile, written by an older version, lacks the measurements that the method needs, and RuleError if a rule needs a
    feature that was not measured.
    """
    spec, profile, method = view.spec, view.profile, seed.method
    if (method == "owl" and not profile.outliers) or (method == "sensitivity" and not profile.sensitivity):
        raise BudgetError(f"the model profile does not have what {method} needs")
    findings = DenseMeasurements(
        outliers=profile.outliers,
        sensitivity=profile.sensitivity,
        removed=view.raw_features["removed"],
        features=view.raw_features,
    )
    if method in ("sensitivity", "rule") or spec.granularity == "layer":
        return allocation_rates(seed, findings, profile.shape, spec.rate, spec.granularity)
    by_layer = allocation_rates(seed, findings, profile.shape, spec.rate, "layer")
    return tuple(_block_rate(unit, by_layer[unit.layer], profile.shape) for unit in view.units)


def _block_rate(unit: Unit, rate: float, shape: ModelShape) -> float:
    """Return the rate of a block whose layer loses `rate`. The MLP takes as much of the loss as possible."""
    layer = shape.layer_parameters(unit.layer)
    whole = shape.layers[unit.layer]
    mlp = shape.mlp_parameters(whole.mlp_channels)
    from_mlp = min(rate * layer, MLP_FIRST_LIMIT * mlp)
    return from_mlp / mlp if unit.kind == "mlp" else (rate * layer - from_mlp) / unit.parameters
