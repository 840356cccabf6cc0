"""Random Llama models of a few thousand parameters, in memory or as a folder with a tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpu_worker.families import take_apart
from gpu_worker.models import LoadedModel

VOCABULARY = 320
"""Tokens of every tiny model: the 256 bytes and some room."""


def tiny_llama(
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
    tokenizer: Any = None,
    **config_options: Any,
) -> LoadedModel:
    """A random model, by default without a tokenizer, grouped-query, and with heads wider than the hidden size."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **config_options,
    )
    model = transformers.LlamaForCausalLM(config)
    _randomise(model, seed)
    model.requires_grad_(False).eval().to(dtype)
    return LoadedModel(model, tokenizer, take_apart(model), identity=f"tiny-{seed}")


def tiny_windows(windows: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [windows, seqlen]."""
    return torch.randint(VOCABULARY, (windows, seqlen), generator=torch.Generator().manual_seed(seed))


def save_tiny_folder(path: Path, **options: Any) -> Path:
    """Save a tiny model (`options` as for `tiny_llama`) with a byte tokenizer, as a checkpoint folder; returns it."""
    tiny_llama(**options).causal_lm.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer() -> Any:
    """A tokenizer of one token a byte, and after those a first and a last token: every text has an encoding."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bytes(), bos_token="<first>", eos_token="<last>"
    )


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights, norms and biases far enough from nought that every one of them shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
