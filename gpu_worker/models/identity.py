"""Identifies a checkpoint's weights by a digest of samples, which is equal on all machines that have a copy."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

BLOCK = 4096
BLOCKS = 1024
"""Number of evenly spread blocks sampled from each weight file: 4 MiB of a file of typically 5 GB."""
MAX_JSON_BYTES = 2**27
"""JSON files up to this size are read completely; larger files are sampled like weights."""

GGUF_HEADER = 2**25
"""Bytes read from the start of a GGUF file, which cover its header: 250,000 tokens and 250,000 merges take half of
these bytes."""


def folder_identity(folder: Path) -> str:
    """Return a digest of a checkpoint: its JSON files, and names, sizes and samples of its weight files.

    Training and pruning change weights everywhere, so samples detect them; a change of a few values may go unnoticed.
    File times and folders do not matter. Pipes, devices and dangling links are skipped.
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
    """Return a digest (sixteen hex digits) of a GGUF file: its header, samples of the rest, size and modification time.

    Reading all of a large file would take a minute at each load. The modification time detects changes that samples
    miss; a copy with another time counts as another file.
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
    """Yield evenly spread blocks of a file, from its start (the header, in safetensors) to its end."""
    with path.open("rb") as opened:
        if size <= BLOCK * BLOCKS:
            yield opened.read()
            return
        for i in range(BLOCKS):
            opened.seek((size - BLOCK) * i // (BLOCKS - 1))
            yield opened.read(BLOCK)
