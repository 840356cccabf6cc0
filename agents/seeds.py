"""Seeds: allocations without search that take part in the first population, so that the search begins with the best."""

from collections.abc import Sequence

import structlog

from agents.view import Refused, Submit, View
from protocol.allocation import Allocation, Findings, Method, allocated
from protocol.alone import removed_alone
from protocol.candidate import Provenance
from protocol.errors import BudgetError

log = structlog.get_logger()


async def plant_seeds(methods: Sequence[Method], view: View, submit: Submit) -> None:
    """Submit the rates of each method; one that cannot reach the pruning rate, or gives a known plan, is left out."""
    for index, method in enumerate(methods):
        provenance = Provenance(agent="seed", source="allocation", round=0, call=index)
        try:
            result = await submit(seed_rates(method, view), provenance)
        except BudgetError as error:
            result = Refused(str(error))
        if isinstance(result, Refused):
            log.info("seed_left_out", method=method, reason=result.reason)


def seed_rates(method: Method, view: View) -> tuple[float, ...]:
    """The rates of a method, by what the model card says.

    Raises BudgetError where it cannot reach the pruning rate, or the card (of an older version) says too little.
    """
    spec, card = view.spec, view.card
    if (method == "owl" and not card.outliers) or (method == "sensitivity" and not card.sensitivity):
        raise BudgetError(f"the model card does not have what {method} needs")
    findings = Findings(
        outliers=card.outliers,
        sensitivity=card.sensitivity,
        removed=[removed_alone(unit, spec, card.shape) for unit in view.units],
    )
    return allocated(Allocation(method=method), findings, card.shape, spec.rate, spec.granularity)
