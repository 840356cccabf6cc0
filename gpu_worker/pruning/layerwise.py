"""Runs the decoder one layer at a time, for sequential scoring and for passes that resume at a layer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpu_worker.models.attention import whole_windows
from gpu_worker.models.families import Decoder
from gpu_worker.models.machine import has_room


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer's call."""

    hidden: Tensor
    """[batch, seqlen, hidden size]."""
    options: dict[str, Any]
    """Positions and masks, which are the same for all texts of this length."""


def record_calls(
    decoder: Decoder, windows: Tensor, *, keep_hidden: bool = True
) -> tuple[tuple[LayerCall, ...], Tensor]:
    """Run the body over `windows` (long, [batch, seqlen]); return each layer's call and the final hidden states.

    Without `keep_hidden`, the calls hold no hidden states, to save memory.
    """
    calls: list[LayerCall] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        calls.append(LayerCall(args[0] if keep_hidden else args[0][:0], options))

    handles = [layer.module.register_forward_pre_hook(record, with_kwargs=True) for layer in decoder.layers]
    try:
        with whole_windows(decoder):
            hidden = decoder.body(input_ids=windows.to(decoder.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(calls), hidden.last_hidden_state


STATES_SHARE = 0.1
"""Share of a GPU's free memory that hidden states may take there. What takes more is kept in main memory."""


class LayerRun:
    """Passes windows through the decoder layer by layer, keeping the hidden states between layers.

    The states are windows × seqlen × hidden size values in the model's dtype, on a GPU if they take little of it, and
    otherwise in main memory.
    """

    def __init__(self, decoder: Decoder, windows: Tensor) -> None:
        """Embed `windows` (long, [n, seqlen])."""
        self._decoder = decoder
        with torch.inference_mode():
            calls, _ = record_calls(decoder, windows[:1], keep_hidden=False)
            self._options = [call.options for call in calls]
            first = decoder.embedding(windows[:1].to(decoder.device))
            self._stays = has_room(first.device, len(windows) * first.nbytes, STATES_SHARE)
            self.states = [self._kept(decoder.embedding(window[None].to(decoder.device))) for window in windows]

    def visit(self, layer: int) -> None:
        """Run decoder layer `layer` over all windows for the hooks on its inputs, and discard its outputs."""
        for states in self.states:
            self._run(layer, states)

    def advance(self, layer: int) -> None:
        """Run decoder layer `layer` over all windows and keep its outputs for the next layer."""
        for i, states in enumerate(self.states):
            self.states[i] = self._kept(self._run(layer, states))

    def _kept(self, states: Tensor) -> Tensor:
        return states if self._stays else states.cpu()

    def _run(self, layer: int, states: Tensor) -> Tensor:
        module = self._decoder.layers[layer].module
        with torch.inference_mode(), whole_windows(self._decoder):
            hidden: Tensor = module(states.to(next(module.parameters()).device), **self._options[layer])
        return hidden
