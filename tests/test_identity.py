import os
import shutil
from pathlib import Path

import pytest

import gpu_worker.identity as module
from gpu_worker.identity import file_digest, folder_identity
from tests.tiny_models import save_tiny_folder


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


def test_the_digest_of_a_file_is_of_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(100_000))
    before = file_digest(file)
    file.write_bytes(bytes(70_000) + b"1" + bytes(29_999))
    assert len(before) == 16 and file_digest(file) != before
