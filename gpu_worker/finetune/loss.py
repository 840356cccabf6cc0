"""Computes the loss of examples without holding all logits at once: of the data, or from a teacher's predictions.

The output head is not trained, so the gradient of the hidden states can be computed in the forward pass, chunk by
chunk, and each chunk's logits are then freed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_worker.measuring.examples import Example
from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import LOGITS_CHUNK_BYTES


def summed_loss(decoder: Decoder, examples: Sequence[Example], teacher: Decoder | None = None) -> Tensor:
    """Return the summed loss in nats of all predicted tokens of `examples`: a differentiable scalar.

    It is the negative log-likelihood, or with a `teacher` KL(teacher ‖ model), over the whole vocabulary (distillation,
    Hinton et al., 2015).

    Shorter examples are padded at the end. No mask is needed, because attention is causal.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    predicted = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        predicted[row, max(example.first, 1) : len(example.tokens)] = True
    states = _states(decoder, tokens, predicted)
    if teacher is not None:
        with torch.no_grad():
            expected = _states(teacher, tokens, predicted)
        distance: Tensor = _HeadDivergence.apply(  # type: ignore[no-untyped-call]
            states, decoder.head, expected, teacher.head
        )
        return distance
    targets = tokens[:, 1:][predicted[:, 1:]].to(states.device)
    loss: Tensor = _HeadLoss.apply(states, targets, decoder.head)  # type: ignore[no-untyped-call]
    return loss


def _states(decoder: Decoder, tokens: Tensor, predicted: Tensor) -> Tensor:
    """Return the final hidden states [n, hidden size] from which the `predicted` ones of `tokens` are predicted."""
    hidden: Tensor = decoder.body(input_ids=tokens.to(decoder.device), use_cache=False).last_hidden_state
    return hidden[:, :-1][predicted[:, 1:].to(hidden.device)].to(decoder.head.weight.device)


def _rows(states: Tensor, head: nn.Linear) -> int:
    """Return the number of rows whose logits are computed at once."""
    return max(1, LOGITS_CHUNK_BYTES.get(states.device.type, LOGITS_CHUNK_BYTES["cuda"]) // (4 * head.out_features))


class _HeadDivergence(torch.autograd.Function):
    """Summed KL(teacher ‖ model) of the predictions from `states` and from `expected`, a chunk of rows at a time.

    Both are final hidden states [n, hidden size]; the hidden sizes and the devices may differ.
    """

    @staticmethod
    def forward(context: Any, states: Tensor, head: nn.Linear, expected: Tensor, teacher_head: nn.Linear) -> Tensor:
        gradient = torch.empty_like(states)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        rows = _rows(states, head)
        for start in range(0, len(states), rows):
            chunk = slice(start, start + rows)
            log_shares = F.log_softmax(head(states[chunk]).float(), dim=-1)
            wanted = F.log_softmax(teacher_head(expected[chunk]).float(), dim=-1).to(states.device)
            total += F.kl_div(log_shares, wanted, reduction="sum", log_target=True).double()
            # The derivative with respect to the logits: the model's probabilities minus the teacher's.
            gradient[chunk] = F.linear((log_shares.exp_() - wanted.exp_()).to(states.dtype), head.weight.t())
        context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `head(states)` ([n, hidden size]) against `targets` ([n]), a chunk of rows at a time."""

    @staticmethod
    def forward(context: Any, states: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
        rows = _rows(states, head)
        gradient = torch.empty_like(states)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        for start in range(0, len(states), rows):
            chunk = slice(start, start + rows)
            log_shares = F.log_softmax(head(states[chunk]).float(), dim=-1)
            target = targets[chunk, None]
            total -= log_shares.gather(1, target).sum().double()
            # The derivative of cross-entropy with respect to the logits: probabilities minus one-hot targets.
            shares = log_shares.exp_()
            shares.scatter_add_(1, target, torch.full_like(target, -1, dtype=shares.dtype))
            # F.linear instead of @: if bfloat16 is slow on this CPU, only linear layers are computed in float32.
            gradient[chunk] = F.linear(shares.to(states.dtype), head.weight.t())
        context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None
