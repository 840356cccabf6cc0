"""Importance by backward elimination (optimal brain surgeon): pieces that other pieces can replace are removed first.

A piece is a head or an MLP channel. With reconstruction (gpu_worker/pruning/reconstruction.py), a piece is important if
the other pieces cannot replace it; how much it contributes does not matter. Removing the inputs i of a projection W and
fitting the remaining columns by least squares increases the mean squared error by

    ε_i = tr(W_i · ((G⁻¹)_ii)⁻¹ · W_iᵀ),   G = E[x·xᵀ] + λ·I

(Hassibi and Stork, 1993; for whole structures ZipLM, Kurtic et al., 2023). Each step removes the pieces with the lowest
ε, and computes W and G⁻¹ again for the remaining pieces. The score of a piece is its place in the order of removal.
Unlike sums over columns (Wanda-sp), these scores account for pieces that replace each other. λ is `DAMPING` for any
text; the fit has less with much text.
"""

import torch
from torch import Tensor

from gpu_worker.models.families import Layer
from gpu_worker.pruning.calibration import LayerProducts
from gpu_worker.pruning.importance import LayerImportance
from gpu_worker.pruning.reconstruction import damped, factored
from protocol.plans.shape import LayerShape

STEPS = 24
"""Number of steps that remove a projection's channels. Removing channels one by one would need thousands of Cholesky
factors."""


def optimal_brain_surgeon(layer: Layer, products: LayerProducts, shape: LayerShape) -> LayerImportance:
    """Return the scores of one layer, fp64, from the input `products` of o_proj and down_proj.

    Heads are removed one by one. KV heads and query heads are scored in separate passes; query heads' scores only order
    them within a KV head. Raises NotFiniteError if the products are not finite.
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
        """Return each piece's place in the order of removal; `pieces` equal groups of inputs are removed."""
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
        """Return the cost of removing each piece next; `inputs` [pieces, width] are the remaining inputs."""
        pieces, width = inputs.shape
        rows = inputs.flatten()
        factor = factored(self._products[rows][:, rows])
        weight = torch.cholesky_solve(self._target[rows], factor).view(pieces, width, -1)
        inverse = torch.cholesky_inverse(factor).view(pieces, width, pieces, width)
        own = inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        costs: Tensor = (weight * torch.linalg.solve(own, weight)).sum(dim=(1, 2))
        return costs
