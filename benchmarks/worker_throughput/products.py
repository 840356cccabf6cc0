"""The matrix products of a candidate alone: the floor under the time of a measurement."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_worker.models.families import Decoder
from gpu_worker.models.limits import LOGITS_CHUNK_BYTES


class Products:
    """The products of one window through the model as it is pruned now, on random inputs.

    These are the seven projections of each layer, the head, and the two products of attention. A causal attention needs
    half of the latter, so they are computed for half of the tokens that are looked at.
    """

    def __init__(self, decoder: Decoder, seqlen: int) -> None:
        self._decoder = decoder
        self._seqlen = seqlen
        self._head_dim = decoder.shape.head_dim
        self.flops = self._count()
        """Floating-point operations of one window."""

    def run(self) -> None:
        """Compute all products once."""
        inputs: dict[tuple[torch.device, int], Tensor] = {}

        def values(device: torch.device, width: int) -> Tensor:
            if (device, width) not in inputs:
                dtype = self._decoder.head.weight.dtype
                inputs[device, width] = torch.ones(1, self._seqlen, width, device=device, dtype=dtype)
            return inputs[device, width]

        with torch.inference_mode():
            for layer in self._decoder.layers:
                for linear in layer.linears:
                    F.linear(values(linear.weight.device, linear.in_features), linear.weight)
                self._attention(values, layer.query.weight.device, layer.query.out_features, layer.key.out_features)
            head = self._decoder.head
            rows = LOGITS_CHUNK_BYTES["cpu" if head.weight.device.type == "cpu" else "cuda"] // (4 * head.out_features)
            for part in torch.split(values(head.weight.device, head.in_features)[0], max(1, rows)):
                F.linear(part, head.weight)

    def _attention(
        self, values: Callable[[torch.device, int], Tensor], device: torch.device, queries: int, keys: int
    ) -> None:
        groups, seen = keys // self._head_dim, math.ceil(self._seqlen / 2)
        query = values(device, queries).view(groups, -1, self._head_dim)
        key = values(device, keys)[:, :seen].reshape(groups, seen, self._head_dim)
        torch.bmm(torch.bmm(query, key.transpose(1, 2)), key)

    def _count(self) -> int:
        found = 0
        for layer in self._decoder.layers:
            found += 2 * self._seqlen * sum(linear.weight.numel() for linear in layer.linears)
            found += 2 * self._seqlen * self._seqlen * layer.query.out_features
        return found + 2 * self._seqlen * self._decoder.head.weight.numel()
