"""Models of known shapes with random weights, so that no download is needed to measure speed."""

from typing import Any

import torch
import transformers

from gpu_worker.models.families import extract_decoder
from gpu_worker.models.loading import LoadedModel

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32_000,
    },
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    },
    "llama-3-70b": {
        "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
"""Sizes by name, as in the models' own configs."""


def random_model(
    name: str, layers: int | None, dtype: torch.dtype, device: torch.device, **options: Any
) -> LoadedModel:
    """Return a model of the shape called `name`, with `layers` decoder layers (None: all) and seeded weights.

    `options` replace sizes of the shape.
    """
    sizes = SHAPES[name] | options | ({} if layers is None else {"num_hidden_layers": layers})
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=8192)
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False).eval()
    described = f"{name} with random weights"
    if layers is not None:
        described += f", {layers} layers"
    return LoadedModel(model, None, extract_decoder(model), identity=f"{described}, seed 0", name=described)
