from pathlib import Path

import pytest
import torch
import transformers

from gpu_worker.models.modeling import MODELINGS, register_pruned_classes
from tests.support.exports import export, pruned
from tests.support.tiny_models import tiny_model, tiny_windows


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
