"""Published sizes of well-known models, for estimates on machines that cannot reach them."""

from typing import Any

import torch
import transformers

from gpu_worker.models.families import Decoder, extract_decoder
from gpu_worker.models.placement import meta_model

_LLAMA_2 = {"model_type": "llama", "vocab_size": 32_000, "max_position_embeddings": 4096}
_LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}


def _sizes(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


_7B, _8B, _13B, _70B = (
    _sizes(4096, 11_008, 32, 32),
    _sizes(4096, 14_336, 32, 32),
    _sizes(5120, 13_824, 40, 40),
    _sizes(8192, 28_672, 80, 64),
)
PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA_2 | _7B,
    "meta-llama/Llama-2-13b-hf": _LLAMA_2 | _13B,
    "meta-llama/Llama-2-70b-hf": _LLAMA_2 | _70B | {"num_key_value_heads": 8},
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3 | _8B | {"max_position_embeddings": 8192},
    "meta-llama/Meta-Llama-3-70B": _LLAMA_3 | _70B | {"max_position_embeddings": 8192},
    "meta-llama/Llama-3.1-8B": _LLAMA_3 | _8B | {"max_position_embeddings": 131_072},
    "meta-llama/Llama-3.1-70B": _LLAMA_3 | _70B | {"max_position_embeddings": 131_072},
    "lmsys/vicuna-7b-v1.5": _LLAMA_2 | _7B,
    "lmsys/vicuna-13b-v1.5": _LLAMA_2 | _13B,
    "mistralai/Mistral-7B-v0.3": {
        "model_type": "mistral", "vocab_size": 32_768, "num_key_value_heads": 8, "max_position_embeddings": 32_768,
    } | _8B,
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2", "vocab_size": 152_064, "num_key_value_heads": 4, "max_position_embeddings": 131_072,
    } | _sizes(3584, 18_944, 28, 28),
}  # fmt: skip
"""Sizes by the model's name on the Hugging Face hub, as its config.json has them. An instruction-tuned variant, such as
`…-Instruct` or `…-chat-hf`, has the sizes of its base."""
VARIANTS = ("-Instruct-v0.3", "-Instruct")


def published_decoder(name: str, dtype: str) -> tuple[Decoder, int] | None:
    """Return the decoder of the model called `name` on the meta device, and its context length; None if unknown."""
    base = next((name.removesuffix(variant) for variant in VARIANTS if name.endswith(variant)), name)
    sizes = PUBLISHED.get(name) or PUBLISHED.get(base.replace("-chat-hf", "-hf"))
    if sizes is None:
        return None
    known = dict(sizes)
    config = transformers.AutoConfig.for_model(known.pop("model_type"), tie_word_embeddings=False, **known)
    return extract_decoder(meta_model(config, getattr(torch, dtype))), int(known["max_position_embeddings"])
