"""Seeds: allocations without search that join the first population, so that the search begins with the best of them."""

from collections.abc import Sequence

import structlog

from agents.population.view import Refused, Submit, View
from protocol.errors import BudgetError
from protocol.plans.allocation import Allocation, DenseMeasurements, Method, allocation_rates
from protocol.plans.candidate import Provenance
from protocol.plans.plan import MLP_FIRST_LIMIT
from protocol.plans.shape import ModelShape, Unit
from protocol.plans.single_unit_pruning import single_unit_removed_share

log = structlog.get_logger()


async def submit_seeds(methods: Sequence[Method], view: View, submit: Submit) -> None:
    """Submit the rates of each method; skip methods that cannot reach the pruning rate or give a known plan."""
    for index, method in enumerate(methods):
        provenance = Provenance(agent="seed", source="allocation", round=0, call=index)
        try:
            result = await submit(seed_rates(method, view), provenance)
        except BudgetError as error:
            result = Refused(str(error))
        if isinstance(result, Refused):
            log.info("seed_left_out", method=method, reason=result.reason)


def seed_rates(method: Method, view: View) -> tuple[float, ...]:
    """Return the rates of a method, computed from the model profile.

    Most methods give one rate per layer and do not split it between attention and MLP. At block granularity, the MLP
    then takes as much of that rate as possible, because removing heads in every layer does the most damage. Raise
    BudgetError if the method cannot reach the pruning rate, or if the profile, written by an older version, lacks the
    measurements that the method needs.
    """
    spec, profile = view.spec, view.profile
    if (method == "owl" and not profile.outliers) or (method == "sensitivity" and not profile.sensitivity):
        raise BudgetError(f"the model profile does not have what {method} needs")
    findings = DenseMeasurements(
        outliers=profile.outliers,
        sensitivity=profile.sensitivity,
        removed=[single_unit_removed_share(unit, spec, profile.shape) for unit in view.units],
    )
    if method == "sensitivity" or spec.granularity == "layer":
        return allocation_rates(Allocation(method=method), findings, profile.shape, spec.rate, spec.granularity)
    by_layer = allocation_rates(Allocation(method=method), findings, profile.shape, spec.rate, "layer")
    return tuple(_block_rate(unit, by_layer[unit.layer], profile.shape) for unit in view.units)


def _block_rate(unit: Unit, rate: float, shape: ModelShape) -> float:
    """Return the rate of a block whose layer loses `rate`. The MLP takes as much of the loss as possible."""
    layer = shape.layer_parameters(unit.layer)
    whole = shape.layers[unit.layer]
    mlp = shape.mlp_parameters(whole.mlp_channels)
    from_mlp = min(rate * layer, MLP_FIRST_LIMIT * mlp)
    return from_mlp / mlp if unit.kind == "mlp" else (rate * layer - from_mlp) / unit.parameters
