import os
import shutil
from pathlib import Path

import pytest

import gpu_worker.models.identity as module
from gpu_worker.models.identity import file_identity, folder_identity
from tests.support.tiny_models import save_tiny_folder


def test_a_copy_on_another_machine_has_the_same_identity(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path / "model")
    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    assert folder_identity(copy) == folder_identity(folder)


def test_other_weights_of_the_same_size_are_another_identity(tmp_path: Path) -> None:
    one, other = (save_tiny_folder(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert (one / "model.safetensors").stat().st_size == (other / "model.safetensors").stat().st_size
    assert folder_identity(one) != folder_identity(other)


def test_another_config_or_tokenizer_is_another_identity(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path)
    before = folder_identity(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    assert folder_identity(folder) != before


def test_weights_of_the_older_format_count_too(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"weights")
    before = folder_identity(tmp_path)
    file.write_bytes(b"Weights")
    assert folder_identity(tmp_path) != before


def test_of_a_large_file_its_ends_and_blocks_between_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "BLOCKS", 3)
    file = tmp_path / "model.safetensors"

    def identity_with(change: int | None) -> str:
        content = bytearray(range(40))
        if change is not None:
            content[change] = 255
        file.write_bytes(content)
        return folder_identity(tmp_path)

    seen = [i for i in range(40) if identity_with(i) != identity_with(None)]
    assert seen == [0, 1, 2, 3, 18, 19, 20, 21, 36, 37, 38, 39]


def test_of_a_large_gguf_file_all_of_the_header_and_samples_of_the_rest_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "BLOCKS", 3)
    monkeypatch.setattr(module, "GGUF_HEADER", 10)
    file = tmp_path / "model.gguf"

    def identity_with(change: int | None) -> str:
        content = bytearray(range(40))
        if change is not None:
            content[change] = 255
        file.write_bytes(content)
        os.utime(file, (0, 0))
        return file_identity(file)

    seen = [i for i in range(40) if identity_with(i) != identity_with(None)]
    assert seen == [*range(10), 18, 19, 20, 21, 36, 37, 38, 39]


def test_a_gguf_file_that_was_written_again_or_is_longer_is_another(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    found = set()
    for size, time in ((100, 1), (100, 2), (101, 2)):
        file.write_bytes(bytes(size))
        os.utime(file, (time, time))
        found.add(file_identity(file))
    assert {len(identity) for identity in found} == {16} and len(found) == 3


def test_a_renamed_gguf_file_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    before = file_identity(file)
    assert file_identity(file.rename(tmp_path / "other.gguf")) == before
