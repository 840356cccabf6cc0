import mmap
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from gpu_worker.models.checkpoints import unmap
from gpu_worker.models.loading import load_model
from tests.support.tiny_models import save_tiny_folder


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def test_weights_stay_the_same_and_tied_ones_tied(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(save_tiny_folder(tmp_path / "model", channels=512))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unmap(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def parameters(tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(tensor, requires_grad=False)
    return module


def test_memory_that_is_no_files_is_left_alone() -> None:
    original = torch.ones(2**16)
    model = parameters(original)
    unmap(model)
    assert torch.equal(original, torch.ones(2**16)), "who else holds it may go on reading it"
    assert torch.equal(model.get_parameter("weight"), original)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
@pytest.mark.parametrize("page", [mmap.PAGESIZE, 16 * mmap.PAGESIZE])
def test_pages_of_a_file_are_given_back_where_all_of_them_is_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(8 * 16 * mmap.PAGESIZE))
    mapped = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    mapped.fill_(1)  # in memory alone: pages that were given back read as the file again
    begin, end = page + 3, 5 * page + 3
    model = parameters(mapped[begin:end])
    monkeypatch.setattr(mmap, "PAGESIZE", page)
    unmap(model)
    assert int(model.get_parameter("weight").min()) == 1
    start = -mapped.data_ptr() % page
    whole = [i for i in range(start, len(mapped) - page + 1, page) if i >= begin and i + page <= end]
    given_back = (mapped == 0).nonzero().flatten()
    assert len(whole) >= 3
    assert given_back.tolist() == list(range(whole[0], whole[-1] + page))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loaded_model_maps_no_file(tmp_path: Path) -> None:
    model = load_model(str(save_tiny_folder(tmp_path / "model", channels=512)), "float32")
    assert str(tmp_path) not in mapped_files()
    assert model.causal_lm is not None
