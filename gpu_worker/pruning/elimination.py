"""Importance by backward elimination (optimal brain surgeon): what the rest can make up for goes first.

Where what stays is fitted to what is removed (gpu_worker/pruning/reconstruction.py), an important piece is not one that
contributes much but one that the others cannot replace. Removing the inputs i of a projection W, and fitting what stays
to what the whole computed, costs

    ε_i = tr(W_i · ((G⁻¹)_ii)⁻¹ · W_iᵀ),   G = E[x·xᵀ] + λ·I

of its mean squared output (Hassibi and Stork, 1993; for whole structures ZipLM, Kurtic et al., 2023). The cheapest are
taken out, W and G⁻¹ become those of what is left, and so on: a piece's score is the step in which it goes. So the score
knows which pieces replace each other, which sums over columns (Wanda-sp) do not.
"""

import torch
from torch import Tensor

from gpu_worker.models.families import Layer
from gpu_worker.pruning.calibration import LayerProducts
from gpu_worker.pruning.importance import LayerImportance
from gpu_worker.pruning.reconstruction import damped, factored
from protocol.plans.shape import LayerShape

STEPS = 24
"""In which the pieces of a projection go, as many in each: one by one, as for heads, would take a thousand factors."""


def optimal_brain_surgeon(layer: Layer, products: LayerProducts, shape: LayerShape) -> LayerImportance:
    """The scores of one layer, from the `products` of what enters o_proj and down_proj: whole numbers, as fp64.

    Heads go one by one, whole KV heads and, for the order of query heads within theirs, query heads. Raises
    NotFiniteError where the products are no numbers.
    """
    kv, each = shape.kv_heads, shape.queries_per_kv
    heads = _Projection(layer.output.weight, products.attention_output)
    query_heads = heads.elimination_steps(shape.query_heads, at_once=1).view(kv, each)
    return LayerImportance(
        query_heads=query_heads,
        kv_heads=heads.elimination_steps(kv, at_once=1) if each > 1 else query_heads[:, 0],
        channels=_Projection(layer.down.weight, products.mlp_output).elimination_steps(
            shape.mlp_channels, at_once=-(-shape.mlp_channels // STEPS)
        ),
    )


class _Projection:
    """A projection that loses input columns."""

    def __init__(self, weight: Tensor, products: Tensor) -> None:
        self._products = damped(products)
        self._target = self._products @ weight.t().float()
        """G·Wᵀ, [inputs, outputs]."""

    def elimination_steps(self, pieces: int, *, at_once: int) -> Tensor:
        """For each of `pieces` groups of adjacent inputs, all of one width, when it goes: the last one has the most."""
        width = len(self._products) // pieces
        inputs = torch.arange(len(self._products), device=self._products.device).view(pieces, width)
        left = torch.arange(pieces, device=self._products.device)
        gone = torch.zeros(pieces, dtype=torch.float64, device=self._products.device)
        step = 0
        while len(left) > 1:
            costs = self._costs(inputs[left])
            order = costs.argsort(stable=True)
            going = left[order[: min(at_once, len(left) - 1)]]
            gone[going] = torch.arange(step, step + len(going), dtype=gone.dtype, device=gone.device)
            step += len(going)
            left = left[order[len(going) :]].sort().values
        gone[left] = step
        return gone

    def _costs(self, inputs: Tensor) -> Tensor:
        """What each piece costs when it goes next, where `inputs` [pieces, width] are left."""
        pieces, width = inputs.shape
        rows = inputs.flatten()
        factor = factored(self._products[rows][:, rows])
        weight = torch.cholesky_solve(self._target[rows], factor).view(pieces, width, -1)
        inverse = torch.cholesky_inverse(factor).view(pieces, width, pieces, width)
        own = inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        costs: Tensor = (weight * torch.linalg.solve(own, weight)).sum(dim=(1, 2))
        return costs
