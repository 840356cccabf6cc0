"""Sequential scoring: each layer is scored on activations that have passed the already pruned layers below it.

As FLAP's code does for Wanda-sp (An et al., 2023). A plan then needs two passes over the calibration text of its own,
where dense scoring needs one pass for all plans.
"""

from torch import Tensor

from gpu_worker.progress import Progress, no_progress, steps
from gpu_worker.pruning.calibration import ActivationHooks, ProductHooks, hooked
from gpu_worker.pruning.importance import wanda_sp
from gpu_worker.pruning.layerwise import LayerRun
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.plans.plan import Plan, dense_plan


def prune_sequentially(
    ordered: OrderedModel, plan: Plan, windows: Tensor, progress: Progress = no_progress, *, reconstruct: bool = False
) -> None:
    """Prune to `plan` by Wanda-sp scores taken layer by layer on `windows` (long, [n, seqlen]).

    With `reconstruct`, each layer is also fitted to what it is given by the pruned layers below it. The result does not
    depend on what was applied before. Raises PlanMismatchError for a plan of another model.
    """
    ordered.check(plan)
    decoder = ordered.decoder
    for i in range(len(decoder.layers)):
        ordered.restore_order(i)
    run = LayerRun(decoder, windows)
    whole = dense_plan(decoder.shape).layers
    for i, kept in enumerate(steps(progress, "scoring", plan.layers)):
        if kept != whole[i]:
            layer = decoder.layers[i]
            with hooked(ActivationHooks, layer) as (watch,):
                run.visit(i)
            ordered.reorder(i, wanda_sp(layer, watch.activations(), decoder.shape.layers[i]))
            if reconstruct:
                with hooked(ProductHooks, layer) as (seen,):
                    run.visit(i)
                ordered.fit(i, seen.products())
            ordered.apply_layer(i, kept)
            ordered.drop_fit(i)  # of all layers together it is several times the model
        if i + 1 < len(decoder.layers):
            run.advance(i)
