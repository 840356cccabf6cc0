"""Computes the loss of examples without holding all logits at once: of the data, or from a teacher's predictions.

The output head is not trained, so the gradient of the hidden states can be computed in the forward pass, chunk by
chunk, and each chunk's logits are then freed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_worker.measuring.examples import Example
from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import LOGITS_CHUNK_BYTES


@dataclass(frozen=True)
class Teacher:
    """The model whose predictions are learnt (distillation, Hinton et al., 2015)."""

    decoder: Decoder
    share: float
    """Share of the loss that is KL(teacher ‖ model); the rest is the negative log-likelihood of the data."""


def summed_loss(decoder: Decoder, examples: Sequence[Example], teacher: Teacher | None = None) -> Tensor:
    """Return the summed loss in nats of all predicted tokens of `examples`: a differentiable scalar.

    It is the negative log-likelihood, mixed with the divergence from the predictions of a `teacher`, if one is given,
    over the whole vocabulary.

    Shorter examples are padded at the end. No mask is needed, because attention is causal.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    predicted = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        predicted[row, max(example.first, 1) : len(example.tokens)] = True
    states = _states(decoder, tokens, predicted)
    targets = tokens[:, 1:][predicted[:, 1:]].to(states.device)
    expected = None
    if teacher is not None:
        with torch.no_grad():
            expected = _Expected(_states(teacher.decoder, tokens, predicted), teacher)
    loss: Tensor = _HeadLoss.apply(states, targets, decoder.head, expected)  # type: ignore[no-untyped-call]
    return loss


def _states(decoder: Decoder, tokens: Tensor, predicted: Tensor) -> Tensor:
    """Return the final hidden states [n, hidden size] from which the `predicted` ones of `tokens` are predicted."""
    hidden: Tensor = decoder.body(input_ids=tokens.to(decoder.device), use_cache=False).last_hidden_state
    return hidden[:, :-1][predicted[:, 1:].to(hidden.device)].to(decoder.head.weight.device)


@dataclass(frozen=True)
class _Expected:
    """The teacher's predictions, from its final hidden states [n, hidden size]."""

    states: Tensor
    teacher: Teacher

    def log_shares(self, chunk: slice, device: torch.device) -> Tensor:
        """Return log-probabilities [rows, vocabulary] on `device`."""
        logits = self.teacher.decoder.head(self.states[chunk]).float()
        return F.log_softmax(logits, dim=-1).to(device)


class _HeadLoss(torch.autograd.Function):
    """Summed loss of `head(states)` ([n, hidden size]), a chunk of rows at a time.

    The loss is the cross-entropy against `targets` ([n]), mixed with KL(teacher ‖ model) if predictions are `expected`.
    """

    @staticmethod
    def forward(context: Any, states: Tensor, targets: Tensor, head: nn.Linear, expected: _Expected | None) -> Tensor:
        rows = max(1, LOGITS_CHUNK_BYTES.get(states.device.type, LOGITS_CHUNK_BYTES["cuda"]) // (4 * head.out_features))
        gradient = torch.empty_like(states)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        own = 1.0 if expected is None else 1 - expected.teacher.share
        for start in range(0, len(states), rows):
            chunk = slice(start, start + rows)
            log_shares = F.log_softmax(head(states[chunk]).float(), dim=-1)
            target = targets[chunk, None]
            total -= own * log_shares.gather(1, target).sum().double()
            wanted = None
            if expected is not None:
                wanted = expected.log_shares(chunk, states.device)
                divergence = F.kl_div(log_shares, wanted, reduction="sum", log_target=True)
                total += expected.teacher.share * divergence.double()
            # The derivative with respect to the logits: the model's probabilities minus those that it shall predict,
            # which are a mixture of the data's token and the teacher's probabilities.
            shares = log_shares.exp_()
            shares.scatter_add_(1, target, torch.full_like(target, -own, dtype=shares.dtype))
            if expected is not None and wanted is not None:
                shares.sub_(wanted.exp_(), alpha=expected.teacher.share)
            # F.linear instead of @: if bfloat16 is slow on this CPU, only linear layers are computed in float32.
            gradient[chunk] = F.linear(shares.to(states.dtype), head.weight.t())
        context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None
