"""Which weights a checkpoint holds, told from a small part of them: the same on every machine that has a copy."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

BLOCK = 4096
BLOCKS = 1024
"""So many blocks of each weight file are looked at, evenly spread: 4 MiB, where a model of 140 GB has files of 5 GB."""


def folder_identity(folder: Path) -> str:
    """A digest of a checkpoint: all of its JSON files, and names, sizes and samples of its weight files.

    Training and pruning change weights everywhere, so that a sample sees it; a change of a few numbers it may miss.
    Times and places of files do not matter.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        _add(digest, path.name, path.read_bytes())
    for pattern in ("*.safetensors", "*.bin"):
        for path in sorted(folder.glob(pattern)):
            size = path.stat().st_size
            _add(digest, f"{path.name}|{size}", b"".join(_samples(path, size)))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """A digest of all of a file, sixteen hex digits."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _add(digest: "hashlib._Hash", name: str, content: bytes) -> None:
    digest.update(f"{name}|{len(content)}|".encode())
    digest.update(content)


def _samples(path: Path, size: int) -> Iterator[bytes]:
    """The beginning of a file, which in safetensors lists its tensors, and blocks from all over it."""
    with path.open("rb") as opened:
        if size <= BLOCK * BLOCKS:
            yield opened.read()
            return
        for i in range(BLOCKS):
            opened.seek((size - BLOCK) * i // (BLOCKS - 1))
            yield opened.read(BLOCK)
