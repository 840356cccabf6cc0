import sys
from pathlib import Path

import pytest
import torch
import transformers

from gpu_worker.mapped import unmap
from gpu_worker.models import load_model
from tests.tiny_models import save_tiny_folder


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def test_weights_stay_the_same_and_tied_ones_tied(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(save_tiny_folder(tmp_path / "model", channels=512))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unmap(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loaded_model_maps_no_file(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_folder(tmp_path / "model", channels=512)), "float32")
    assert str(tmp_path) not in mapped_files()
    assert model.causal_lm is not None
