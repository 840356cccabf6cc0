"""Least-squares reconstruction: fits the kept columns of a projection to the output of the whole projection.

Pruning removes columns from o_proj and down_proj. The kept columns get the weights that best reproduce the output of
the whole projection on the calibration text, as in SparseGPT (Frantar and Alistarh, 2023) and SlimGPT (Ling et al.,
2024), but for whole columns and in closed form:

    W'_k = argmin_V  E‖V·x_k − W·x‖² + λ·‖V − W_k‖²  =  W·G_:k·(G_kk)⁻¹,   G = E[x·xᵀ] + λ·I

where x is the projection's input, k the kept columns, and λ a fraction of the mean of E[x_j²] (`damping_for`). The fit
uses only the calibration text, trains nothing and adds no parameters.

Columns are ordered by importance, so the kept columns are a prefix, and the Cholesky factor of a leading block of G is
the leading block of G's factor. With G = L·Lᵀ and Z = Lᵀ·Wᵀ, both computed once,

    W'_kᵀ = L_kk⁻ᵀ · Z_k

is one triangular solve per projection. If a plan removes query heads from a KV head that it keeps, the kept
columns are no prefix, and G_kk is factored again.
"""

import torch
from torch import Tensor

from gpu_worker.models.errors import NotFiniteError

DAMPING = 0.01
"""λ as a fraction of the mean of E[x_j²], for little text."""
DAMPING_TOKENS = 80
"""With more text, λ is worth as many tokens. A ridge guards against noise, of which more text has less: with 65,000
tokens, this lowers SmolLM2's perplexity on the test text by one percent at a rate of 0.3, and by two at 0.5
(docs/lab-notes/reconstruction.md)."""

MIN_MEAN_SQUARE = 1e-12
"""Lower bound of the mean in λ, so that λ is positive even if all inputs are always zero."""


class FittedColumns:
    """The columns of a linear layer in order of importance. If a plan removes some, the others get fitted weights."""

    def __init__(
        self, stored: Tensor, products: Tensor, *, damping: float = DAMPING, in_main_memory: bool = False
    ) -> None:
        """Prepare the fit.

        `stored` holds the columns as [pieces, ..., outputs]; pieces are KV heads or MLP channels, as in OrderedModel.
        `products` is E[x·xᵀ] in the same order, and `damping` the λ of the fit. With `in_main_memory`, the matrices of
        the fit are kept there, and what a plan needs of them is copied to the device of `stored`. Raises NotFiniteError
        if the products are not finite.
        """
        self.stored = stored
        self._factor = factored(damped(products.to(stored.device), damping))
        self._target = self._factor.t() @ stored.flatten(0, -2).float()
        if in_main_memory:
            self._factor, self._target = _in_main_memory(self._factor), _in_main_memory(self._target)

    def first(self, *counts: int) -> Tensor:
        """Return the weight [outputs, kept inputs] of the columns whose index in dimension i is below `counts[i]`."""
        return self.at(self._first(*counts))

    def at(self, kept: Tensor) -> Tensor:
        """Return the weight [outputs, kept inputs] of the columns that `kept` [pieces, ...] marks (at least one).

        Returns a view of the original weight if all columns are kept, otherwise a fitted copy.
        """
        where = kept.flatten().nonzero()[:, 0]
        if len(where) == kept.numel():
            return self.stored.flatten(0, -2).t()
        factor, target = self._fit(where)
        fitted: Tensor = torch.linalg.solve_triangular(factor.t(), target, upper=True)
        return fitted.to(self.stored.dtype).t()

    def energies(self, *counts: int) -> tuple[float, float]:
        """Return E‖fitted output‖² of the first `counts` columns, and that of all columns; both damped.

        With the Cholesky factor, the energy of the fit is ‖Z_k‖².
        """
        _, target = self._fit(self._first(*counts).flatten().nonzero()[:, 0])
        return target.square().sum().item(), self._target.square().sum().item()

    def _first(self, *counts: int) -> Tensor:
        kept = torch.zeros(self.stored.shape[:-1], dtype=torch.bool)
        kept[tuple(slice(count) for count in counts)] = True
        return kept

    def _fit(self, where: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor L_kk of the columns `where`, and their Z_k."""
        device = self.stored.device
        if int(where[-1]) == len(where) - 1:
            rows = self._factor[: len(where)].to(device, non_blocking=True)
            return rows[:, : len(where)], self._target[: len(where)].to(device, non_blocking=True)
        rows = self._factor[where.to(self._factor.device)].to(device)
        factor = factored(rows @ rows.t())
        target = rows @ self._target.to(device, non_blocking=True)
        return factor, torch.linalg.solve_triangular(factor, target, upper=False)


def _in_main_memory(matrix: Tensor) -> Tensor:
    """Return a copy of a GPU's `matrix` in main memory, from which its first rows can be copied back fast."""
    return matrix.contiguous().cpu().pin_memory() if matrix.is_cuda else matrix.contiguous()


def damping_for(tokens: int) -> float:
    """Return λ, as a fraction of the mean of E[x_j²], for a fit to this number of calibration tokens."""
    return min(DAMPING, DAMPING_TOKENS / tokens)


def damped(products: Tensor, damping: float = DAMPING) -> Tensor:
    """Return G = E[x·xᵀ] + λ·I in fp32. Raises NotFiniteError if the products are not finite."""
    strength = products.diagonal().mean()
    if not strength.isfinite():
        raise NotFiniteError("the inputs of a projection are not finite on the calibration text")
    sums = products.float().clone()
    sums.diagonal().add_(damping * strength.clamp_min(MIN_MEAN_SQUARE))
    return sums


def factored(products: Tensor) -> Tensor:
    """Return the lower Cholesky factor of `products` in their dtype.

    Raises NotFiniteError if rounding leaves no such factor, even in fp64.
    """
    factor, failed = torch.linalg.cholesky_ex(products)
    if bool(failed):  # fp32 is not precise enough here
        factor, failed = torch.linalg.cholesky_ex(products.double())
    if bool(failed):
        raise NotFiniteError("the inputs of a projection are linearly dependent: there is no least-squares fit")
    found: Tensor = factor.to(products.dtype)
    return found
