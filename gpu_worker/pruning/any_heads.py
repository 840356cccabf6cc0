"""From scores of heads to a plan that may remove any query heads (protocol/plans/any_heads.py)."""

from collections.abc import Sequence

from gpu_worker.pruning.importance import LayerImportance
from protocol.plans.any_heads import AnyHeadsPlan, make_any_heads_plan
from protocol.plans.shape import ModelShape


def any_heads_plan(
    rates: Sequence[float], importance: Sequence[LayerImportance], shape: ModelShape, *, multiple_of: int = 1
) -> AnyHeadsPlan:
    """The plan that removes `rates`, one per layer, by the scores of a model of this `shape`.

    Raises BudgetError where the budget cannot be met.
    """
    scores = [layer.query_heads.tolist() for layer in importance]
    return make_any_heads_plan(rates, scores, shape, multiple_of=multiple_of)
