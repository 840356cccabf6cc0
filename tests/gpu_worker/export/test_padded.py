import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from gpu_worker.export.padded import write_padded
from gpu_worker.models.families import FAMILIES
from tests.support.exports import UNEVEN, export, loaded_elsewhere, pruned
from tests.support.load_export import greedy
from tests.support.tiny_models import tiny_model, tiny_windows

TOKENS = tiny_windows(2, 24, seed=5)


def test_every_family_computes_the_same_in_its_plain_architecture(tmp_path: Path) -> None:
    models = {family: pruned(tiny_model(family)) for family in FAMILIES}
    models["biases"] = pruned(tiny_model("llama", bias=True, tied=False))
    folders = {name: export(model, "padded", tmp_path / name) for name, model in models.items()}
    results = loaded_elsewhere(list(folders.values()), TOKENS, tmp_path)
    for name, model in models.items():
        elsewhere = results[folders[name]]
        assert elsewhere["class"] == type(model.causal_lm).__name__
        assert torch.allclose(elsewhere["logits"], model.causal_lm(input_ids=TOKENS).logits, atol=1e-4), name
        assert torch.equal(elsewhere["dynamic"], greedy(model.causal_lm, TOKENS)), name
        assert elsewhere["parameters"] == model.decoder.shape.total_parameters


def test_there_is_no_code_in_the_folder_and_no_trace_of_any(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    # As Phi-3 is published: with code that transformers has had itself for long.
    model.causal_lm.config.auto_map = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    write_padded(pruned(model), UNEVEN, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in config and "per_layer_config" not in config
    assert config["architectures"] == ["Phi3ForCausalLM"] and config["model_type"] == "phi3"


def test_kept_heads_lie_within_their_groups_and_the_rest_is_nought(tmp_path: Path) -> None:
    model = pruned(tiny_model("llama"))
    write_padded(model, UNEVEN, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.0.self_attn"
    # Layer 0 keeps two of three KV heads and one of two query heads in each.
    used = {name: _blocks_in_use(weights[f"{layer}.{name}.weight"]) for name in ("q_proj", "k_proj", "v_proj")}
    used["o_proj"] = _blocks_in_use(weights[f"{layer}.o_proj.weight"].t())
    assert used == {"q_proj": [0, 2], "k_proj": [0, 1], "v_proj": [0, 1], "o_proj": [0, 2]}
    down = weights["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(down[:, :20], model.decoder.layers[0].down.weight) and not down[:, 20:].any()


def _blocks_in_use(rows: torch.Tensor, head_dim: int = 8) -> list[int]:
    return [i for i, block in enumerate(torch.split(rows, head_dim)) if block.any()]


def test_it_is_as_large_as_the_dense_model(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    dense = tmp_path / "dense"
    model.causal_lm.save_pretrained(dense)
    folder = export(pruned(model), "padded", tmp_path / "out")
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
    assert shapes == {name: tensor.shape for name, tensor in load_file(dense / "model.safetensors").items()}
    assert isinstance(transformers.AutoConfig.from_pretrained(folder), transformers.Qwen2Config)
