import os
import shutil
from collections.abc import Callable
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


def bytes_that_count(file: Path, identity: Callable[[], str]) -> list[int]:
    """Which of the forty bytes of `file` change its identity."""

    def identity_with(changed: int | None) -> str:
        file.write_bytes(bytes(255 if i == changed else i for i in range(40)))
        os.utime(file, (0, 0))
        return identity()

    return [i for i in range(40) if identity_with(i) != identity_with(None)]


def test_of_a_large_file_its_ends_and_blocks_between_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole header of a GGUF file counts too."""
    for name, value in (("BLOCK", 4), ("BLOCKS", 3), ("GGUF_HEADER", 10)):
        monkeypatch.setattr(module, name, value)
    seen = bytes_that_count(tmp_path / "model.safetensors", lambda: folder_identity(tmp_path))
    assert seen == [0, 1, 2, 3, 18, 19, 20, 21, 36, 37, 38, 39]
    seen = bytes_that_count(tmp_path / "model.gguf", lambda: file_identity(tmp_path / "model.gguf"))
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
