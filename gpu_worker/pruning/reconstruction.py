"""Least-squares reconstruction: what stays of a block's inputs makes up for what is removed.

Pruning takes columns from o_proj and down_proj. The columns that stay are then given the weights that come nearest to
what the whole projection computed on the calibration text, as in SparseGPT (Frantar and Alistarh, 2023) and SlimGPT
(Ling et al., 2024), but for whole columns and in closed form:

    W'_k = argmin_V  E‖V·x_k − W·x‖² + λ·‖V − W_k‖²  =  W·G_:k·(G_kk)⁻¹,   G = E[x·xᵀ] + λ·I

with x the projection's input, k the columns that stay, and λ a share (`DAMPING`) of the mean of E[x_j²]. No data is
seen but the calibration text's, nothing is trained, and no parameter is added.

Columns are ordered by importance, so what stays of an MLP is a prefix of them; and the Cholesky factor of a leading
part of G is that part of the factor of G. With G = L·Lᵀ and Z = Lᵀ·Wᵀ, both taken once,

    W'_kᵀ = L_kk⁻ᵀ · Z_k

is one triangular solve a block, whatever the plan.
"""

import torch
from torch import Tensor

from gpu_worker.models.errors import NotFiniteError

DAMPING = 0.01
"""λ as a share of the mean of E[x_j²]. A tenth or ten times as much changes SmolLM2's perplexity by a few percent."""

MIN_MEAN_SQUARE = 1e-12
"""Inputs that are always nought are damped as if their mean square were this."""


class FittedColumns:
    """Columns of a linear layer in order of importance, stored as rows, that are fitted to what is kept of them."""

    def __init__(self, stored: Tensor, products: Tensor) -> None:
        """`stored` is the weight's columns [pieces, ..., outputs]; `products` E[x·xᵀ] of its inputs in that order.

        Raises NotFiniteError where the products are no numbers.
        """
        self.stored = stored
        self._factor = factored(damped(products))
        self._target = self._factor.t() @ stored.flatten(0, -2).float()

    def first(self, *counts: int) -> Tensor:
        """The weight [outputs, kept inputs] of the first `counts` along the leading dimensions."""
        kept = torch.zeros(self.stored.shape[:-1], dtype=torch.bool)
        kept[tuple(slice(count) for count in counts)] = True
        return self.at(kept)

    def at(self, kept: Tensor) -> Tensor:
        """The weight [outputs, kept inputs] of the columns that `kept` [pieces, ...] marks, with one piece or more.

        A view of the weight as it was where all are kept, and a fitted copy where not.
        """
        where = kept.flatten().nonzero()[:, 0]
        if len(where) == kept.numel():
            return self.stored.flatten(0, -2).t()
        if int(where[-1]) == len(where) - 1:
            factor, target = self._factor[: len(where), : len(where)], self._target[: len(where)]
        else:
            rows = self._factor[where.to(self._factor.device)]
            factor = factored(rows @ rows.t())
            target = torch.linalg.solve_triangular(factor, rows @ self._target, upper=False)
        fitted: Tensor = torch.linalg.solve_triangular(factor.t(), target, upper=True)
        return fitted.to(self.stored.dtype).t()


def damped(products: Tensor) -> Tensor:
    """G = E[x·xᵀ] + λ·I, in fp32. Raises NotFiniteError where the products are no numbers."""
    strength = products.diagonal().mean()
    if not strength.isfinite():
        raise NotFiniteError("what enters a projection on the calibration text is no finite number")
    sums = products.float().clone()
    sums.diagonal().add_(DAMPING * strength.clamp_min(MIN_MEAN_SQUARE))
    return sums


def factored(products: Tensor) -> Tensor:
    """The lower Cholesky factor, in the products' type. Raises NotFiniteError where rounding has left none to find."""
    factor, failed = torch.linalg.cholesky_ex(products)
    if bool(failed):  # fp32 is not enough for these
        factor, failed = torch.linalg.cholesky_ex(products.double())
    if bool(failed):
        raise NotFiniteError("what enters a projection cannot be told apart: there is no least-squares fit")
    found: Tensor = factor.to(products.dtype)
    return found
