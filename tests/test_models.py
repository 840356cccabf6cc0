from pathlib import Path

import pytest
import torch
import transformers

import gpu_worker.models as module
from gpu_worker.models import load_model
from protocol.errors import ModelError
from tests.tiny_models import save_tiny_folder, tiny_llama, tiny_windows


def test_a_folder_is_loaded_with_its_tokenizer_ready_to_measure(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_folder(tmp_path, seed=3)), "float32")
    windows = tiny_windows(1, 8)
    expected = tiny_llama(seed=3).causal_lm(input_ids=windows).logits
    assert torch.allclose(model.causal_lm(input_ids=windows).logits, expected, atol=1e-5)
    assert model.tokenizer.decode(model.tokenizer("Wörter\n")["input_ids"]) == "Wörter\n"
    assert not model.causal_lm.training
    assert not any(p.requires_grad for p in model.causal_lm.parameters())


def test_the_type_is_the_one_asked_for(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_folder(tmp_path)), "bfloat16")
    assert {p.dtype for p in model.causal_lm.parameters()} == {torch.bfloat16}


def test_the_identity_stays_with_the_files_and_changes_with_the_weights(tmp_path: Path) -> None:
    folder = str(save_tiny_folder(tmp_path))
    first = load_model(folder, "float32").identity
    assert load_model(folder, "float32").identity == first
    save_tiny_folder(tmp_path, seed=1, channels=40)
    assert load_model(folder, "float32").identity != first


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelError, match=r"there is no folder '\./nowhere'"):
        load_model("./nowhere", "float32")


def test_a_hub_name_without_the_hub_says_what_to_pass_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hub_reachable", lambda: False)
    with pytest.raises(ModelError, match="the hub cannot be reached; pass a folder, or `smollm2`"):
        load_model("nobody/no-model", "float32")


def test_an_unsupported_family_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"models of type 'gpt2' cannot be pruned; supported model types: .*llama"):
        load_model(str(tmp_path), "float32")


@pytest.mark.model
def test_smollm2_comes_from_its_package_without_a_hub() -> None:
    model = load_model("smollm2", "bfloat16")
    assert len(model.decoder.shape.layers) == 30
    assert model.decoder.shape.total_parameters == 134_515_008
