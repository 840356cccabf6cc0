"""Computes the loss of examples without holding all logits at once.

The output head is not trained, so the gradient of the hidden states can be computed in the forward pass, chunk by
chunk, and each chunk's logits are then freed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpu_worker.finetune.data import Example
from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import LOGITS_CHUNK_BYTES


def summed_loss(decoder: Decoder, examples: Sequence[Example]) -> Tensor:
    """Return the summed negative log-likelihood in nats of all predicted tokens of `examples`: a differentiable scalar.

    Shorter examples are padded at the end. No mask is needed, because attention is causal.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    predicted = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        predicted[row, max(example.first, 1) : len(example.tokens)] = True
    hidden = decoder.body(input_ids=tokens.to(decoder.device), use_cache=False).last_hidden_state
    head_device = decoder.head.weight.device
    which = predicted[:, 1:].to(hidden.device)
    states = hidden[:, :-1][which].to(head_device)
    targets = tokens[:, 1:][predicted[:, 1:]].to(head_device)
    loss: Tensor = _HeadLoss.apply(states, targets, decoder.head)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of `head(states)` ([n, hidden size]) against `targets` ([n]), a chunk of rows at a time."""

    @staticmethod
    def forward(context: Any, states: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
        rows = max(1, LOGITS_CHUNK_BYTES.get(states.device.type, LOGITS_CHUNK_BYTES["cuda"]) // (4 * head.out_features))
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
