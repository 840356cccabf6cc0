"""Perplexity: token-weighted negative log-likelihood over windows of tokens."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import LOGITS_CHUNK_BYTES
from gpu_worker.progress import Progress, no_progress, steps


def perplexity(
    decoder: Decoder, windows: Tensor, progress: Progress = no_progress, stage: str = "measuring"
) -> tuple[float, int]:
    """Perplexity of `windows` (long, [n, seqlen]) and the number of tokens it is averaged over, n × (seqlen − 1).

    The mean is over tokens, as in transformers' own `labels=` loss; a window's first token is never predicted.
    Raises NotFiniteError where the result is no finite number.
    """
    total = 0.0
    with torch.inference_mode():
        for window in steps(progress, stage, windows):
            total += window_loss(decoder, window[None])
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return perplexity_of(total, tokens), tokens


def perplexity_of(loss: float, tokens: int) -> float:
    """Perplexity where the loss of so many tokens sums to `loss` nats. Raises NotFiniteError where it is no number."""
    mean = loss / tokens
    try:
        result = math.exp(mean)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise NotFiniteError(f"the mean loss over {tokens} tokens is {mean}")
    return result


def checked_perplexity(decoder: Decoder, windows: Tensor, progress: Progress, stage: str) -> tuple[float, int]:
    """As `perplexity`; what is broken shows after the first window: the mean loss is the mean of the windows' means."""
    losses = []
    tokens = 0
    for window in steps(progress, stage, windows):
        value, counted = perplexity(decoder, window[None])
        losses.append(math.log(value))
        tokens += counted
    return math.exp(math.fsum(losses) / len(losses)), tokens


def window_loss(decoder: Decoder, window: Tensor) -> float:
    """Summed negative log-likelihood, in nats, of all but the first token of each window in `window` [batch, seqlen].

    One window at a time is as fast as several: a thousand tokens fill the matmuls, and the attention is smaller.
    """
    return hidden_loss(decoder, final_hidden(decoder, window), window)


def final_hidden(decoder: Decoder, window: Tensor) -> Tensor:
    """The body's final hidden states [batch, seqlen, hidden size] of `window` [batch, seqlen]."""
    hidden: Tensor = decoder.body(input_ids=window.to(decoder.device), use_cache=False).last_hidden_state
    return hidden


def hidden_loss(decoder: Decoder, hidden: Tensor, window: Tensor) -> float:
    """The loss of `window` [batch, seqlen] given the body's final hidden states [batch, seqlen, hidden size].

    Summed in fp32 (fp64 between chunks).
    """
    total = torch.zeros((), dtype=torch.float64, device=decoder.head.weight.device)
    for logits, targets in logit_chunks(decoder, hidden, window):
        total += F.cross_entropy(logits, targets, reduction="sum").double()
    return total.item()


def logit_chunks(decoder: Decoder, hidden: Tensor, window: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For the predicted tokens of `window` in order, some rows at a time: logits [rows, vocabulary] and tokens [rows].

    Logits of all tokens at once would be gigabytes. They are made in the model's type and handed out in fp32, all on
    the head's device: of a model spread over several GPUs it need not be that of the last layer.
    """
    states = hidden[:, :-1].flatten(0, 1).to(decoder.head.weight.device)
    targets = window[:, 1:].flatten().to(states.device)
    rows = max(
        1, LOGITS_CHUNK_BYTES.get(states.device.type, LOGITS_CHUNK_BYTES["cuda"]) // (4 * decoder.head.out_features)
    )
    for chunk, target in zip(torch.split(states, rows), torch.split(targets, rows), strict=True):
        yield decoder.head(chunk).float(), target
