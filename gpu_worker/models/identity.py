"""Which weights a checkpoint holds, told from a small part of them: the same on every machine that has a copy."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

BLOCK = 4096
BLOCKS = 1024
"""So many blocks of each weight file are looked at, evenly spread: 4 MiB, where a model of 140 GB has files of 5 GB."""
MAX_JSON_BYTES = 2**27
"""A JSON file up to this size is read whole; a larger one belongs to no tokenizer, and is sampled like weights."""

GGUF_HEADER = 2**25
"""The header of a GGUF file lies within so many bytes: 250,000 tokens and as many merges take half of it."""


def folder_identity(folder: Path) -> str:
    """A digest of a checkpoint: all of its JSON files, and names, sizes and samples of its weight files.

    Training and pruning change weights everywhere, so that a sample sees it; a change of a few numbers it may miss.
    Times and places of files do not matter. Pipes, devices and links that lead nowhere are left out.
    """
    digest = hashlib.sha256()
    for pattern in ("*.json", "*.safetensors", "*.bin"):
        for path in sorted(filter(Path.is_file, folder.glob(pattern))):
            size = path.stat().st_size
            if pattern == "*.json" and size <= MAX_JSON_BYTES:
                _add(digest, path.name, path.read_bytes())
            else:
                _add(digest, f"{path.name}|{size}", b"".join(_samples(path, size)))
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """A digest of a GGUF file on this machine, sixteen hex digits: its beginning, samples of the rest, size and time.

    All of a large file would take a minute at each load. The time of its last change sees what a sample may miss, and a
    copy that has another time counts as another file.
    """
    status = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        _add(digest, f"{status.st_size}|{status.st_mtime_ns}", opened.read(GGUF_HEADER))
    _add(digest, "samples", b"".join(_samples(path, status.st_size)))
    return digest.hexdigest()[:16]


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
