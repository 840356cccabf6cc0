"""Folders that lack a file of the model: each is refused in one sentence that names the file, or loads without it."""

import json
from pathlib import Path

import pytest

from tests.gpu_worker.models.test_broken_models import refusal
from tests.support.tiny_models import save_tiny_folder

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_folder(tmp_path / "model")


def test_weights_that_are_not_there_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002.bin"}}))
    assert "lacks 'model-00002.bin', which model.safetensors.index.json names" in refusal(folder)
    index.unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert "holds no weights" in refusal(folder)


def test_a_folder_without_a_tokenizer_is_called_so(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer (tokenizer.json)" in refusal(folder)


def test_an_index_that_transformers_does_not_read_need_not_be_complete(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1.bin"}}))
    assert not refusal(folder)


def test_a_file_that_git_has_put_in_place_of_weights_is_called_so(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "'model.safetensors'" in (said := refusal(folder)) and "run `git lfs pull`" in said
