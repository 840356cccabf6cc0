import pytest
import torch
import transformers

from gpu_worker.families import head_dim_of, take_apart
from protocol.errors import ModelError
from tests.tiny_models import tiny_llama


def test_the_shape_reads_heads_and_widths_from_the_model() -> None:
    shape = tiny_llama(layers=2, query_heads=6, kv_heads=3, head_dim=8, channels=48).decoder.shape
    assert [(s.query_heads, s.kv_heads, s.mlp_channels) for s in shape.layers] == [(6, 3, 48)] * 2
    assert (shape.hidden_size, shape.head_dim) == (36, 8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_shape_accounts_for_every_parameter(tied: bool, bias: bool) -> None:
    model = tiny_llama(tied=tied, bias=bias)
    assert model.decoder.shape.total_parameters == sum(p.numel() for p in model.causal_lm.parameters())


def test_an_unsupported_family_is_refused_with_the_supported_ones() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)
    with pytest.raises(ModelError, match=r"'gpt2'.*llama"):
        take_apart(transformers.GPT2LMHeadModel(config))


def test_a_model_with_an_adapter_is_refused() -> None:
    model = tiny_llama().causal_lm
    model.model.layers[0].self_attn.register_parameter("adapter", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ModelError, match="without adapters"):
        take_apart(model)


def test_a_config_without_head_dim_means_hidden_size_by_heads() -> None:
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=4)
    config.head_dim = None
    assert head_dim_of(config) == 8
