"""Measures the KL divergence of a pruned model from the dense model, and its perplexity, in one pass over a text.

The dense model's predictions are stored once per text: for each predicted token, the logits of the `KL_TOP_K` most
probable tokens and the total probability of all others. Merging tokens can only lower a KL divergence, so the result is
a lower bound of the divergence over the whole vocabulary, and exact for vocabularies of at most `KL_TOP_K` tokens.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.measuring.perplexity import final_hidden, logit_chunks, perplexity_of, read
from gpu_worker.measuring.windows import on_device, predicted_tokens
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import KL_TOP_K
from gpu_worker.progress import Progress, no_progress, steps


@dataclass(frozen=True)
class DensePredictions:
    """The dense model's predictions for a text: `k` tokens kept for each of `n` predictions.

    Logits keep the model's dtype, in which they were computed, so nothing is lost.
    """

    tokens: Tensor
    """The most probable tokens, int32 [n, k]."""
    logits: Tensor
    """Logits of these tokens [n, k]."""
    log_total: Tensor
    """Log-sum-exp of all logits, fp32 [n]."""
    log_rest: Tensor
    """Log-probability of all other tokens together, fp32 [n]; -inf if all tokens are kept."""

    @classmethod
    def empty(cls, count: int, top: int, dtype: torch.dtype) -> "DensePredictions":
        """Allocate space for `count` predictions with `top` tokens each."""
        return cls(
            torch.empty(count, top, dtype=torch.int32),
            torch.empty(count, top, dtype=dtype),
            torch.empty(count),
            torch.empty(count),
        )

    @property
    def bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in vars(self).values())

    def to(self, device: torch.device) -> "DensePredictions":
        """Return the predictions on `device`."""
        return DensePredictions(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def pinned(self) -> "DensePredictions":
        """Return the predictions in main memory from which a GPU copies without being waited for."""
        return DensePredictions(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})

    def part(self, rows: slice) -> "DensePredictions":
        """Return views of the predictions of `rows`."""
        return DensePredictions(self.tokens[rows], self.logits[rows], self.log_total[rows], self.log_rest[rows])

    def keep(self, chunk: "_Chunk") -> None:
        """Store the predictions of `chunk`, and overwrite its logits."""
        values, tokens = chunk.logits.topk(self.tokens.shape[1], sorted=False)
        self.tokens[chunk.rows] = tokens.to("cpu", torch.int32)
        self.logits[chunk.rows] = values.to("cpu", self.logits.dtype)
        self.log_total[chunk.rows] = chunk.log_total.cpu()
        self.log_rest[chunk.rows] = (_log_sum_of_others(chunk.logits, tokens) - chunk.log_total).cpu()

    def kept_tokens(self, rows: slice, device: torch.device) -> Tensor:
        """Return the kept tokens of `rows`, as indices [rows, k] on `device`."""
        return self.tokens[rows].to(device, non_blocking=True).long()

    def log_probabilities(self, rows: slice, device: torch.device) -> Tensor:
        """Return log-probabilities of the kept tokens and, in the last column, of all other tokens together.

        The result is fp32 [rows, k + 1] on `device`.
        """
        logits, total, rest = (
            kept[rows].to(device, non_blocking=True) for kept in (self.logits, self.log_total, self.log_rest)
        )
        return torch.cat([logits.float() - total[:, None], rest[:, None]], dim=-1)


@dataclass(frozen=True)
class Divergence:
    """Perplexity and mean KL divergence over the predicted tokens of a text."""

    perplexity: float
    kl: float
    """KL(dense ‖ pruned) in nats."""
    tokens: int


def dense_predictions(
    decoder: Decoder,
    windows: Tensor,
    progress: Progress = no_progress,
    stage: str = "measuring",
    *,
    top: int = KL_TOP_K,
) -> tuple[DensePredictions, float, int]:
    """Return the dense model's predictions for `windows`, its perplexity and the number of predicted tokens.

    The windows are long, [n, seqlen], on the CPU.

    Raises NotFiniteError if the perplexity is not finite.
    """
    tokens = predicted_tokens(windows)
    head = decoder.head
    kept = DensePredictions.empty(tokens, min(top, head.out_features), head.weight.dtype)
    losses = []
    with torch.inference_mode():
        each = steps(progress, stage, on_device(windows, decoder.device))
        for chunk in _chunks(decoder, each):
            losses.append(chunk.loss)
            kept.keep(chunk)
    return kept, perplexity_of(sum(read(losses)), tokens), tokens


def divergence(decoder: Decoder, windows: Tensor, dense: DensePredictions) -> Divergence:
    """Measure the divergence of the predictions for `windows` (long, [n, seqlen], on the CPU) from those of `dense`.

    Raises NotFiniteError if the perplexity or the divergence is not finite.
    """
    loss, kl = read(window_divergence(decoder, on_device(windows, decoder.device), dense))
    tokens = len(dense.tokens)
    return Divergence(perplexity_of(loss, tokens), mean_divergence(kl, tokens), tokens)


def window_divergence(decoder: Decoder, windows: Iterable[Tensor], dense: DensePredictions) -> tuple[Tensor, Tensor]:
    """Return the loss and the divergence of the predictions for `windows` (each long, [seqlen]), summed over tokens.

    Both are fp64 scalars in nats on the head's device (see `perplexity.read`).
    """
    losses, divergences = [], []
    with torch.inference_mode():
        for chunk in _chunks(decoder, windows):
            losses.append(chunk.loss)
            divergences.append(_divergence_of(chunk, dense))
        return torch.stack(losses).sum(), torch.stack(divergences).sum()


def mean_divergence(total: float, tokens: int) -> float:
    """Return the mean of a divergence that sums to `total` over `tokens`. Raises NotFiniteError if it is not finite."""
    if not math.isfinite(total):
        raise NotFiniteError(f"the mean KL divergence over {tokens} tokens is {total / tokens}")
    return total / tokens


def predictions_from(decoder: Decoder, hidden: Tensor, windows: Tensor) -> DensePredictions:
    """Return the predictions for `windows` (long, [n, seqlen]) from their final hidden states [n, seqlen, hidden size].

    Raises NotFiniteError if they are not finite.
    """
    head = decoder.head
    kept = DensePredictions.empty(windows[:, 1:].numel(), min(KL_TOP_K, head.out_features), head.weight.dtype)
    for chunk in _chunks_of(decoder, hidden, windows):
        kept.keep(chunk)
    if not bool(kept.log_total.isfinite().all()):
        raise NotFiniteError("the predictions are not finite")
    return kept


def divergence_from(decoder: Decoder, hidden: Tensor, windows: Tensor, dense: DensePredictions) -> float:
    """Return KL(dense ‖ pruned) in nats per predicted token from final hidden states; NaN if these are not finite."""
    total = sum(read([_divergence_of(chunk, dense) for chunk in _chunks_of(decoder, hidden, windows)]))
    return total / len(dense.tokens)


def _divergence_of(chunk: "_Chunk", dense: DensePredictions) -> Tensor:
    """Return the divergence summed over the predictions of a chunk, and overwrite its logits."""
    device = chunk.logits.device
    found = chunk.log_probabilities(dense.kept_tokens(chunk.rows, device))
    return kl_divergence(dense.log_probabilities(chunk.rows, device), found).sum()


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Return KL(expected ‖ found) of each row in nats, fp64 [rows]; both are log-probabilities [rows, outcomes].

    Sums p·ln(p/q) − p + q. As p and q each sum to one, this is the divergence, but no term is negative, and errors in a
    row's normalisation cancel. In p·ln(p/q) alone, these errors could be as large as a small divergence.
    """
    expected, found = expected.double(), found.double()
    p, q = expected.exp(), found.exp()
    # Terms with p = 0 add nothing to the sum of p·ln(p/q), because 0·ln 0 is 0.
    terms = torch.where(p > 0, p * (expected - found), 0.0) - p + q
    return terms.sum(-1).clamp_min(0.0)


@dataclass(frozen=True)
class _Chunk:
    """Some consecutive predictions of a model."""

    rows: slice
    """Positions of these predictions in the text."""
    logits: Tensor
    """fp32 [rows, vocabulary]."""
    log_total: Tensor
    """Log-sum-exp of the logits [rows]."""
    targets: Tensor
    """The actual next tokens [rows]."""

    @property
    def loss(self) -> Tensor:
        """Return the summed negative log-likelihood, a fp64 scalar."""
        return (self.log_total - self.logits.gather(-1, self.targets[:, None])[:, 0]).double().sum()

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """Return log-probabilities of `tokens` [rows, k] and, in the last column, of all other tokens together.

        Overwrites the logits.
        """
        kept = self.logits.gather(-1, tokens)
        others = _log_sum_of_others(self.logits, tokens)
        return torch.cat([kept, others[:, None]], dim=-1) - self.log_total[:, None]


def _chunks(decoder: Decoder, windows: Iterable[Tensor]) -> Iterator[_Chunk]:
    """Yield the model's predictions for each window in turn."""
    start = 0
    for window in windows:
        for chunk in _chunks_of(decoder, final_hidden(decoder, window[None]), window[None], start):
            start = chunk.rows.stop
            yield chunk


def _chunks_of(decoder: Decoder, hidden: Tensor, windows: Tensor, start: int = 0) -> Iterator[_Chunk]:
    """Yield the predictions from final hidden states; `start` is the position of the first prediction in the text."""
    for logits, targets in logit_chunks(decoder, hidden, windows):
        yield _Chunk(slice(start, start + len(targets)), logits, logits.logsumexp(-1), targets)
        start += len(targets)


def _log_sum_of_others(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-sum-exp of all logits except those at `tokens`, which are overwritten.

    Subtracting the probability of `tokens` from 1 would leave only rounding error if the model is confident.
    """
    return logits.scatter_(-1, tokens, -math.inf).logsumexp(-1)
