"""Measures perplexity: the exponential of the mean negative log-likelihood per token over windows."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_worker.measuring.windows import on_device, predicted_tokens, token_ids
from gpu_worker.models.attention import whole_windows
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import LOGITS_CHUNK_BYTES
from gpu_worker.progress import Progress, no_progress, steps


def perplexity(
    decoder: Decoder, windows: Tensor, progress: Progress = no_progress, stage: str = "measuring"
) -> tuple[float, int]:
    """Return the perplexity of `windows` (long, [n, seqlen], on the CPU) and its number of predicted tokens.

    The mean is over tokens, as in transformers' `labels=` loss; a window's first token is never predicted.
    Raises NotFiniteError if the result is not finite.
    """
    with torch.inference_mode():
        each = steps(progress, stage, on_device(windows, decoder.device))
        losses = [window_loss(decoder, window[None]) for window in each]
    tokens = predicted_tokens(windows)
    return perplexity_of(sum(read(losses)), tokens), tokens


def read(values: Sequence[Tensor]) -> list[float]:
    """Return scalars (0-dim, on one device) as floats.

    This waits for all that the device still has to compute. While windows are measured, nothing else waits for it, so
    that it is never idle.
    """
    return torch.stack(list(values)).tolist() if values else []


def perplexity_of(loss: float, tokens: int) -> float:
    """Return the perplexity for a total `loss` in nats over `tokens`. Raises NotFiniteError if it is not finite."""
    mean = loss / tokens
    try:
        result = math.exp(mean)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise NotFiniteError(f"the mean loss over {tokens} tokens is {mean}")
    return result


def checked_perplexity(decoder: Decoder, windows: Tensor, progress: Progress, stage: str) -> tuple[float, int]:
    """Measure as `perplexity` does, but check each window, so that a broken model is reported early."""
    losses = []
    tokens = 0
    for window in steps(progress, stage, windows):
        value, counted = perplexity(decoder, window[None])
        losses.append(math.log(value) * counted)
        tokens += counted
    return math.exp(math.fsum(losses) / tokens), tokens


def window_loss(decoder: Decoder, window: Tensor) -> Tensor:
    """Return the summed negative log-likelihood in nats of all but the first tokens of `window` [batch, seqlen].

    The sum is a fp64 scalar on the head's device (see `read`).

    Running one window at a time is as fast as running several, because a thousand tokens saturate the matmuls.
    """
    return hidden_loss(decoder, final_hidden(decoder, window), window)


def final_hidden(decoder: Decoder, window: Tensor) -> Tensor:
    """Return the body's final hidden states [batch, seqlen, hidden size] of `window` [batch, seqlen]."""
    with whole_windows(decoder):
        ids = token_ids(window).to(decoder.device)
        hidden: Tensor = decoder.body(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def hidden_loss(decoder: Decoder, hidden: Tensor, window: Tensor) -> Tensor:
    """Return the loss of `window` [batch, seqlen] given the body's final hidden states [batch, seqlen, hidden size].

    Sums in fp32 within a chunk, and in fp64 over the chunks.
    """
    total = torch.zeros((), dtype=torch.float64, device=decoder.head.weight.device)
    for logits, targets in logit_chunks(decoder, hidden, window):
        total += F.cross_entropy(logits, targets, reduction="sum").double()
    return total


def logit_chunks(decoder: Decoder, hidden: Tensor, window: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits [rows, vocabulary] and actual tokens [rows] of chunks of the predictions for `window`, in order.

    Tokens that are given are left out, if `window` is on the CPU, where windows with such tokens are (see `on_device`).

    Logits of all tokens at once would take gigabytes. They are computed in the model's dtype and yielded in fp32 on the
    head's device, which may differ from the last layer's if the model is spread over several GPUs.
    """
    states, targets = hidden[:, :-1].flatten(0, 1), window[:, 1:].flatten()
    if targets.device.type == "cpu" and bool((targets < 0).any()):
        where = (targets >= 0).nonzero()[:, 0]
        states, targets = states.index_select(0, where.to(states.device)), targets[where]
    states = states.to(decoder.head.weight.device)
    targets = targets.to(states.device)
    rows = max(
        1, LOGITS_CHUNK_BYTES.get(states.device.type, LOGITS_CHUNK_BYTES["cuda"]) // (4 * decoder.head.out_features)
    )
    for chunk, target in zip(torch.split(states, rows), torch.split(targets, rows), strict=True):
        yield decoder.head(chunk).float(), target
