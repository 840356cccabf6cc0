"""Checkpoints that are broken, or hold another model than their config says."""

from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.models.checkpoints import longest_positions, reading, reason
from gpu_worker.models.loading import load_model
from protocol.errors import DataError, ModelError
from tests.support.tiny_models import change_config, save_tiny_folder


def add_weight(folder: Path, name: str, weight: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: weight}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("packing", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"bits": 3}, "unknown method"),
    ],
)
def test_quantised_weights_are_refused_before_they_are_loaded(
    tmp_path: Path, packing: dict[str, object], method: str
) -> None:
    change_config(save_tiny_folder(tmp_path), quantization_config=packing)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=rf"are quantised \({method}\) .*; pass the unquantised model"):
        load_model(str(tmp_path), "float32")


def test_a_checkpoint_without_one_of_its_weights_is_refused(tmp_path: Path) -> None:
    weights = load_file(save_tiny_folder(tmp_path) / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 are missing .* such as 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_model(str(tmp_path), "float32")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"intermediate_size": 40}, r"of another size.* such as 'model\.layers\.0\.mlp\.down_proj\.weight'"),
        ({"num_hidden_layers": 2}, r"different model without them: 16, such as 'model\.layers\.2\."),
        ({"attention_bias": False}, r"without them: 12, such as 'model\.layers\.0\.self_attn\.k_proj\.bias'"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(
    tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    change_config(save_tiny_folder(tmp_path, bias=True), **changes)
    with pytest.raises(ModelError, match=sentence):
        load_model(str(tmp_path), "float32")


@pytest.mark.parametrize("table", ["inv_freq", "cos_cached", "sin_cached"])
def test_tables_that_old_checkpoints_hold_are_not_missed(tmp_path: Path, table: str) -> None:
    folder = save_tiny_folder(tmp_path)
    add_weight(folder, f"model.layers.0.self_attn.rotary_emb.{table}", torch.ones(4))
    assert len(load_model(str(folder), "float32").decoder.layers) == 3


def test_a_tied_head_may_be_in_the_checkpoint_too(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    add_weight(folder, "lm_head.weight", embedding.clone())
    assert load_model(str(folder), "float32").decoder.shape.other_parameters == 320 * 36 + 36


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": "abc"}, "has num_hidden_layers 'abc', which must be an integer from 1 to 1,000"),
        ({"num_hidden_layers": 0}, "has num_hidden_layers 0,"),
        ({"num_hidden_layers": -1}, "has num_hidden_layers -1,"),
        ({"num_hidden_layers": True}, "has num_hidden_layers True,"),
        ({"hidden_size": 0}, "has hidden_size 0,"),
        ({"hidden_size": 37}, r"\(config: .*hidden size \(37\) is not a multiple"),
        ({"num_attention_heads": 0}, "has num_attention_heads 0,"),
        ({"num_key_value_heads": 0}, "has num_key_value_heads 0,"),
        ({"num_key_value_heads": 4}, "has 4 KV heads, which cannot share 6 query heads evenly"),
        ({"head_dim": 0}, "has head_dim 0,"),
        ({"hidden_act": "nosuch"}, r"\(config: KeyError: 'nosuch'\)"),
        ({"rope_parameters": {"rope_type": "nosuch"}}, r"\(config: .*nosuch"),
        ({"rope_parameters": 3}, r"\(config: .*'rope_parameters'"),
        ({"dtype": "nosuch"}, r"\(config: AttributeError: .*'nosuch'"),
        ({"quantization_config": "x"}, r"are quantised \(unknown method\)"),
        ({"quantization_config": [1]}, r"are quantised \(unknown method\)"),
        ({"quantization_config": {}}, "quant_method"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_a_sentence(
    tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    change_config(save_tiny_folder(tmp_path), **changes)
    with pytest.raises(ModelError, match=sentence) as refusal:
        load_model(str(tmp_path), "float32")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("config.json", b"null", "config"),
        ("config.json", b"3", "config"),
        ("config.json", b"{", "config"),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("tokenizer.json", b"{", "tokenizer"),
        ("tokenizer_config.json", b"[]", "tokenizer"),
        ("generation_config.json", b"[]", "weights"),
        ("model.safetensors", b"", "weights"),
        ("pytorch_model.bin", b"garbage" * 100, "weights"),
        ("pytorch_model.bin", b"", "weights"),
    ],
)
def test_a_broken_file_is_refused_in_a_sentence(tmp_path: Path, file: str, content: bytes, part: str) -> None:
    folder = save_tiny_folder(tmp_path)
    if part == "weights" and file != "generation_config.json":
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match=rf"cannot be loaded \({part}: .+\); pass a model's folder") as refusal:
        load_model(str(folder), "float32")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: device-side assert triggered"),
        DataError("ours"),
        KeyboardInterrupt(),
    ],
)
def test_an_error_that_is_not_about_the_files_stays_what_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, reading(str):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("It is so.\nLong advice"), "It is so"),
        (ValueError("Error for field 'x':\n    It is a list"), "Error for field 'x': It is a list"),
        (KeyError("x"), "KeyError: 'x'"),
        (EOFError(), "EOFError"),
        (UnpicklingError("Run its code."), "the weight file is damaged, or contains more than weights"),
        (ValueError(), "ValueError"),
    ],
)
def test_the_reason_is_one_line(error: Exception, line: str) -> None:
    assert reason(error) == line


@pytest.mark.parametrize(
    ("stated", "rope", "longest"),
    [
        (None, None, None),
        (4096, None, 4096),
        (4096, {"rope_type": "default"}, 4096),
        # Vicuna 16K, Qwen2.5 as its card stretches it, a config that states both lengths.
        (4096, {"rope_type": "linear", "factor": 4.0}, 16384),
        (32768, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        # Llama 3.2, Gemma 3.
        (131072, {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}, 131072),
        (131072, {"full_attention": {"rope_type": "linear", "factor": 8.0}}, 131072),
    ],
)
def test_the_longest_text_counts_how_positions_are_stretched(
    stated: int | None, rope: dict[str, Any] | None, longest: int | None
) -> None:
    config = SimpleNamespace(max_position_embeddings=stated, rope_parameters=rope)
    assert longest_positions(config) == longest
    assert longest_positions(SimpleNamespace()) is None
