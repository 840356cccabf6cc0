from pathlib import Path

import pytest
import torch
import transformers

from gpu_worker.export.modeling import MODELINGS
from gpu_worker.export.trusted import is_ours, register_pruned_classes
from tests.exports import export, pruned
from tests.tiny_models import tiny_model, tiny_windows


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_pruned_classes()


@pytest.mark.parametrize("family", MODELINGS)
def test_an_export_loads_here_without_running_code_of_the_folder(tmp_path: Path, family: str) -> None:
    model = pruned(tiny_model(family))
    folder = export(model, "hf", tmp_path / "out")
    (modeling,) = folder.glob("*.py")
    modeling.write_text(f"from pathlib import Path\n\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    for trust in (False, True):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        tokens = tiny_windows(1, 24)
        assert torch.allclose(loaded(input_ids=tokens).logits, model.causal_lm(input_ids=tokens).logits, atol=1e-4)
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_ours_while_its_code_is_what_this_version_writes(tmp_path: Path) -> None:
    folder = export(pruned(tiny_model("llama")), "hf", tmp_path / "out")
    assert is_ours(folder)
    (modeling,) = folder.glob("*.py")
    code = modeling.read_text()
    modeling.write_text(code.replace("\n", "\r\n"))
    assert not is_ours(folder)
    modeling.write_text(code)
    (folder / "other.py").write_text("")
    assert not is_ours(folder)


def test_a_folder_without_code_is_not_ours(tmp_path: Path) -> None:
    assert not is_ours(export(pruned(tiny_model("llama")), "padded", tmp_path / "out"))
    assert not is_ours(tmp_path / "nowhere")
