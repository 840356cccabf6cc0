"""Causal attention over whole windows, for measuring and calibrating: no padding, no KV cache.

transformers looks at the position of every token before it decides that a window needs no mask, for which a GPU must
finish all its work. While `whole_windows` lasts, no mask is made. And for float32 with grouped queries on a GPU, torch
has only a kernel that keeps seqlen² values for each head; here keys and values are repeated, for which it has another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpu_worker.models.families import Decoder

NAME = "selfpruner_whole_windows"


@contextmanager
def whole_windows(decoder: Decoder) -> Iterator[None]:
    """Let the decoder's attention read whole windows: each token sees all tokens before it, and masks are ignored."""
    config: Any = decoder.body.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def causal_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output [batch, seqlen, query heads, head dim], as transformers calls it.

    `query` is [batch, query heads, seqlen, head dim]; `key` and `value` may have fewer heads. With `sliding_window`,
    each token sees only that many tokens, itself included.
    """
    each = query.shape[1] // key.shape[1]
    if sliding_window is not None and sliding_window < query.shape[2]:
        mask = _window_mask(query.shape[2], sliding_window, query.device)
        found = F.scaled_dot_product_attention(
            query, repeat_kv(key, each), repeat_kv(value, each), attn_mask=mask, scale=scaling
        )
    else:
        if query.dtype == torch.float32 and query.device.type == "cuda":
            key, value = repeat_kv(key, each), repeat_kv(value, each)
        found = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] < query.shape[1]
        )
    return found.transpose(1, 2).contiguous(), None


@lru_cache(maxsize=4)
def _window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """Return which tokens [tokens, tokens] each token sees."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril().triu(1 - window)


ALL_ATTENTION_FUNCTIONS.register(NAME, causal_attention)
