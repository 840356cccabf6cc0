"""A tiny Llama as a GGUF file, written with the library of the format."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import torch
from torch import Tensor

from gpu_worker.models.loading import LoadedModel
from tests.support.tiny_models import VOCABULARY, byte_letters

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_tiny_gguf(
    path: Path,
    model: LoadedModel,
    *,
    architecture: str = "llama",
    rope_theta: float = 10000.0,
    rope_factors: Sequence[float] = (),
    rope_scaling: str | None = None,
    without: str | None = None,
) -> Path:
    """Write `model`, a Llama with tied weights, to `path` and return that; `without` leaves one tensor out."""
    config = model.causal_lm.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope_theta)
    writer.add_vocab_size(VOCABULARY)
    if rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope_scaling))
    _add_tokenizer(writer)
    tensors = _tensors(model)
    if rope_factors:
        tensors["rope_freqs"] = torch.tensor(rope_factors)
    for name, tensor in tensors.items():
        if name != without:
            writer.add_tensor(f"{name}.weight", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: LoadedModel) -> dict[str, Tensor]:
    body, config = model.causal_lm.model, model.causal_lm.config
    tensors = {"token_embd": body.embed_tokens.weight, "output_norm": body.norm.weight}
    for i, layer in enumerate(body.layers):
        tensors |= {f"blk.{i}.{name}": layer.get_submodule(path).weight for name, path in _LAYER.items()}
        tensors[f"blk.{i}.attn_q"] = _interleaved(layer.self_attn.q_proj.weight, config.num_attention_heads)
        tensors[f"blk.{i}.attn_k"] = _interleaved(layer.self_attn.k_proj.weight, config.num_key_value_heads)
    return tensors


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Permute the rows of q or k for llama.cpp, which rotates adjacent pairs."""
    rows, inputs = weight.shape
    return weight.view(heads, 2, rows // heads // 2, inputs).transpose(1, 2).reshape(rows, inputs)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = [*byte_letters(), "ab"]  # a list of merges must not be empty
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *(f"<{i}>" for i in range(VOCABULARY - len(tokens)))])
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
