"""KL divergence of a pruned model from the dense one, and its perplexity, in one pass over a text.

The dense model's predictions are kept once per text: for each predicted token the `KL_TOP_K` likeliest tokens with
their logits, and the mass of all others in one bucket. Merging tokens into a bucket can only lower a KL divergence, so
what is measured is a lower bound of that over the whole vocabulary, and exact where the vocabulary is not larger.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.measuring.perplexity import final_hidden, logit_chunks, perplexity_of
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import KL_TOP_K
from gpu_worker.progress import Progress, no_progress, steps


@dataclass(frozen=True)
class DensePredictions:
    """What the dense model predicts for a text, on the CPU; `n` predicted tokens, `k` kept ones for each.

    Logits have the model's own type: they were computed in it, so nothing is lost.
    """

    tokens: Tensor
    """The most probable tokens, int32 [n, k]."""
    logits: Tensor
    """Their logits [n, k]."""
    log_total: Tensor
    """Logarithm of the sum of the exponentials of all logits, fp32 [n]."""
    log_rest: Tensor
    """Logarithm of the probability of all tokens that are not kept, fp32 [n]; -inf where all are."""

    @classmethod
    def empty(cls, count: int, top: int, dtype: torch.dtype) -> "DensePredictions":
        """Room for `count` predictions with `top` tokens each."""
        return cls(
            torch.empty(count, top, dtype=torch.int32),
            torch.empty(count, top, dtype=dtype),
            torch.empty(count),
            torch.empty(count),
        )

    def part(self, rows: slice) -> "DensePredictions":
        """The predictions of some rows: views."""
        return DensePredictions(self.tokens[rows], self.logits[rows], self.log_total[rows], self.log_rest[rows])

    def keep(self, chunk: "_Chunk") -> None:
        """Fill in the predictions of `chunk`, whose logits are used up."""
        values, tokens = chunk.logits.topk(self.tokens.shape[1], sorted=False)
        self.tokens[chunk.rows] = tokens.to("cpu", torch.int32)
        self.logits[chunk.rows] = values.to("cpu", self.logits.dtype)
        self.log_total[chunk.rows] = chunk.log_total.cpu()
        self.log_rest[chunk.rows] = (_log_sum_of_others(chunk.logits, tokens) - chunk.log_total).cpu()

    def kept_tokens(self, rows: slice, device: torch.device) -> Tensor:
        """The kept tokens of `rows`, as indices [rows, k] on `device`."""
        return self.tokens[rows].to(device, torch.long)

    def log_probabilities(self, rows: slice, device: torch.device) -> Tensor:
        """Log-probabilities of the kept tokens and, last, of all others: fp32 [rows, k + 1] on `device`."""
        logits, total, rest = (kept[rows].to(device) for kept in (self.logits, self.log_total, self.log_rest))
        return torch.cat([logits.float() - total[:, None], rest[:, None]], dim=-1)


@dataclass(frozen=True)
class Divergence:
    """Means over the predicted tokens of a text."""

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
    """What the dense model predicts for `windows` (long, [n, seqlen]), its perplexity, and the tokens averaged over.

    Raises NotFiniteError where the perplexity is no finite number.
    """
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    head = decoder.head
    kept = DensePredictions.empty(tokens, min(top, head.out_features), head.weight.dtype)
    loss = 0.0
    with torch.inference_mode():
        for chunk in _chunks(decoder, windows, progress, stage):
            loss += chunk.loss
            kept.keep(chunk)
    return kept, perplexity_of(loss, tokens), tokens


def divergence(
    decoder: Decoder,
    windows: Tensor,
    dense: DensePredictions,
    progress: Progress = no_progress,
    stage: str = "measuring",
) -> Divergence:
    """How far the model's predictions for `windows` (long, [n, seqlen]) are from the `dense` ones of the same windows.

    Raises NotFiniteError where the perplexity or the divergence is no finite number.
    """
    loss = kl = 0.0
    with torch.inference_mode():
        for chunk in _chunks(decoder, windows, progress, stage):
            loss += chunk.loss
            kl += _divergence_of(chunk, dense)
    tokens = len(dense.tokens)
    if not math.isfinite(kl):
        raise NotFiniteError(f"the mean KL divergence over {tokens} tokens is {kl / tokens}")
    return Divergence(perplexity_of(loss, tokens), kl / tokens, tokens)


def predictions_from(decoder: Decoder, hidden: Tensor, windows: Tensor) -> DensePredictions:
    """What is predicted for `windows` (long, [n, seqlen]) from their final hidden states [n, seqlen, hidden size].

    Raises NotFiniteError where that is no number.
    """
    head = decoder.head
    kept = DensePredictions.empty(windows[:, 1:].numel(), min(KL_TOP_K, head.out_features), head.weight.dtype)
    for chunk in _chunks_of(decoder, hidden, windows):
        kept.keep(chunk)
    if not bool(kept.log_total.isfinite().all()):
        raise NotFiniteError("the predictions are no numbers")
    return kept


def divergence_from(decoder: Decoder, hidden: Tensor, windows: Tensor, dense: DensePredictions) -> float:
    """KL(dense ‖ pruned), in nats a predicted token, from final hidden states; no number where they are none."""
    total = sum(_divergence_of(chunk, dense) for chunk in _chunks_of(decoder, hidden, windows))
    return total / len(dense.tokens)


def _divergence_of(chunk: "_Chunk", dense: DensePredictions) -> float:
    """Summed over the predictions of a chunk, whose logits are used up."""
    device = chunk.logits.device
    found = chunk.log_probabilities(dense.kept_tokens(chunk.rows, device))
    return kl_divergence(dense.log_probabilities(chunk.rows, device), found).sum().item()


def kl_divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL(expected ‖ found) of each row, in nats, fp64 [rows]; both are log-probabilities [rows, outcomes].

    The sum of p·ln(p/q) − p + q: as p and q sum to one it is the divergence, but no term is negative, and an error in
    a row's normalisation cancels where it would else be as large as a small divergence.
    """
    expected, found = expected.double(), found.double()
    p, q = expected.exp(), found.exp()
    # What is never expected adds nothing, whatever is found: 0·ln 0 is 0.
    terms = torch.where(p > 0, p * (expected - found), 0.0) - p + q
    return terms.sum(-1).clamp_min(0.0)


@dataclass(frozen=True)
class _Chunk:
    """Some predictions of a model: their places among all of the text, and what they are of."""

    rows: slice
    logits: Tensor
    """fp32 [rows, vocabulary]."""
    log_total: Tensor
    """Logarithm of the sum of the exponentials of the logits [rows]."""
    targets: Tensor
    """The tokens that came [rows]."""

    @property
    def loss(self) -> float:
        """Summed negative log-likelihood."""
        return (self.log_total - self.logits.gather(-1, self.targets[:, None])[:, 0]).double().sum().item()

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """Of `tokens` [rows, k] and, last, of all others: [rows, k + 1]. The logits are used up."""
        kept = self.logits.gather(-1, tokens)
        others = _log_sum_of_others(self.logits, tokens)
        return torch.cat([kept, others[:, None]], dim=-1) - self.log_total[:, None]


def _chunks(decoder: Decoder, windows: Tensor, progress: Progress, stage: str) -> Iterator[_Chunk]:
    """What the model predicts for each window in turn, as it is now."""
    start = 0
    for window in steps(progress, stage, windows):
        yield from _chunks_of(decoder, final_hidden(decoder, window[None]), window[None], start)
        start += len(window) - 1


def _chunks_of(decoder: Decoder, hidden: Tensor, windows: Tensor, start: int = 0) -> Iterator[_Chunk]:
    """What is predicted from final hidden states; the first prediction is number `start` of the text."""
    for logits, targets in logit_chunks(decoder, hidden, windows):
        yield _Chunk(slice(start, start + len(targets)), logits, logits.logsumexp(-1), targets)
        start += len(targets)


def _log_sum_of_others(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logarithm of the summed exponentials of the logits not at `tokens`, which are overwritten.

    Not 1 minus the others' sum: where the model is sure, that difference is nothing but rounding.
    """
    return logits.scatter_(-1, tokens, -math.inf).logsumexp(-1)
