"""Random models of a few thousand parameters, of every family, in memory or as a folder with a tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpu_worker.models.families import extract_decoder
from gpu_worker.models.loading import LoadedModel

VOCABULARY = 320
"""Tokens of every tiny model: the 256 bytes and some room."""

_CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
    "smollm3": transformers.SmolLM3Config,
    "seed_oss": transformers.SeedOssConfig,
    "ernie4_5": transformers.Ernie4_5Config,
    "hunyuan_v1_dense": transformers.HunYuanDenseV1Config,
    "exaone4": transformers.Exaone4Config,
}
LAYOUTS = ("exaone4", "gemma3_text", "llama", "phi3", "qwen2")
"""One family for each way in which layers are built. Tests that do not depend on the computation of attention need no
more: the others differ from `llama` in attention alone."""
_PECULIARITIES: dict[str, dict[str, Any]] = {
    # Windows shorter than the texts of the tests, so that they matter.
    "mistral": {"sliding_window": 9},
    "gemma3_text": {
        "sliding_window": 9,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"partial_rotary_factor": 0.5},
    # The second of three layers does not rotate, and has a window.
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 9},
    "seed_oss": {"attention_out_bias": False},
    "exaone4": {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def tiny_llama(**options: Any) -> LoadedModel:
    """A random Llama; see `tiny_model`."""
    return tiny_model("llama", **options)


def tiny_model(family: str, *, seed: int = 0, **options: Any) -> LoadedModel:
    """A random model of a family's real classes, without a tokenizer; `options` as for `tiny_causal_lm`."""
    model = tiny_causal_lm(family, seed=seed, **options)
    return LoadedModel(model, None, extract_decoder(model), identity=f"tiny-{family}-{seed}")


def tiny_causal_lm(
    family: str,
    *,
    layers: int = 3,
    hidden_size: int = 36,
    query_heads: int = 6,
    kv_heads: int = 3,
    head_dim: int = 8,
    channels: int = 48,
    tied: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config_options: Any,
) -> Any:
    """A random causal language model of transformers.

    By default grouped-query, and its heads are wider than the hidden size. `bias` is for families that can have it;
    `config_options` are those of the family's config.
    """
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": channels,
        "num_hidden_layers": layers,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    biases = {"attention_bias": bias, "mlp_bias": bias} if bias else {}
    config = _CONFIGS[family](**(sizes | _PECULIARITIES.get(family, {}) | biases | config_options))
    model = transformers.AutoModelForCausalLM.from_config(config)
    # Gemma's norms multiply by 1 + weight, the others' by weight.
    _randomise(model, seed, norm=0.0 if family == "gemma3_text" else 1.0)
    return model.requires_grad_(False).eval().to(dtype)


def tiny_windows(windows: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [windows, seqlen]."""
    return torch.randint(VOCABULARY, (windows, seqlen), generator=torch.Generator().manual_seed(seed))


def save_tiny_folder(path: Path, family: str = "llama", **options: Any) -> Path:
    """Save a tiny model (`options` as for `tiny_causal_lm`) and a byte tokenizer as a checkpoint folder; returns it."""
    tiny_causal_lm(family, **options).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def change_config(folder: Path, **changes: object) -> None:
    """Write `changes` into the config.json of a checkpoint folder."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte, then one bos and one eos token."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_tokenizer(), bos_token="<first>", eos_token="<last>"
    )


def _randomise(model: torch.nn.Module, seed: int, *, norm: float) -> None:
    """Set weights, norms and biases far enough from zero that each of them affects the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(norm + 0.1 * noise if "norm" in name else 0.2 * noise)


def byte_letters() -> list[str]:
    """Return the letter that represents each of the 256 bytes, in the order of their tokens."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, which encodes every text without training."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(byte_letters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
