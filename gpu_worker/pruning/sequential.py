"""Sequential scoring: scores each layer on the outputs of the already pruned layers below it.

FLAP's code does this for Wanda-sp (An et al., 2023). Each plan needs two passes over the calibration text, or three
with reconstruction; dense scoring needs one pass for all plans.
"""

from torch import Tensor

from gpu_worker.progress import Progress, no_progress, steps
from gpu_worker.pruning.calibration import ActivationHooks, ProductHooks, hooked
from gpu_worker.pruning.importance import wanda_sp
from gpu_worker.pruning.layerwise import LayerRun
from gpu_worker.pruning.ordered_model import OrderedModel
from gpu_worker.pruning.reconstruction import damping_for
from protocol.plans.plan import Plan, dense_plan


def prune_sequentially(
    ordered: OrderedModel, plan: Plan, windows: Tensor, progress: Progress = no_progress, *, reconstruct: bool = False
) -> None:
    """Prune to `plan` by Wanda-sp scores computed layer by layer on `windows` (long, [n, seqlen]).

    With `reconstruct`, each layer is also reconstructed on the outputs of the pruned layers below it. The result does
    not depend on earlier plans. Raises PlanMismatchError for a plan of another model.
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
            with hooked(ActivationHooks, layer) as (hooks,):
                run.visit(i)
            ordered.reorder(i, wanda_sp(layer, hooks.activations(), decoder.shape.layers[i]))
            if reconstruct:
                with hooked(ProductHooks, layer) as (product_hooks,):
                    run.visit(i)
                ordered.fit(i, product_hooks.products(), damping=damping_for(windows.numel()))
            ordered.apply_layer(i, kept)
            ordered.drop_fit(i)  # the fits of all layers would take several times the model's memory
        if i + 1 < len(decoder.layers):
            run.advance(i)
