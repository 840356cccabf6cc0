"""The user's cache folder: entries are written atomically, verified when they are read, and bounded in size.

An entry is a folder `KIND-DIGEST`, where the digest is that of everything that determines its contents. Two processes
may use the cache at the same time: each writes to a folder of its own, and the first to finish wins.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog

MAX_BYTES = 50 * 10**9
"""Most bytes of all entries. The inputs of an 8B model's projections, for reconstruction, take 28 GB."""
MAX_SHARE = 1 / 3
"""Most that all entries take of the space that they and free space take together."""
IN_USE_SECONDS = 3600.0
"""An entry that was used in this time is not deleted to make room: a process may be reading it."""
MANIFEST = "entry.json"
"""File of an entry that says what it holds, with a digest of each file."""
READ_BYTES = 2**22
KINDS = ("calibration", "features", "gguf", "predictions", "self-text", "sensitivity", "tokens")
UNREADABLE = (OSError, ValueError, KeyError, TypeError)
"""What reading a damaged entry raises."""

T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True)
class Entry:
    """An entry of the cache."""

    path: Path
    kind: str
    """One of KINDS."""
    about: str
    """The model that it belongs to; empty if it does not say."""
    size: int
    """Bytes."""
    used: float
    """When it was last used, in seconds since 1970."""


def cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/selfpruner`, or `~/.cache/selfpruner`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "selfpruner"


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache. If it does not exist, `write` fills it first.

    `write` gets an empty folder, which is renamed into place when it returns. Raises OSError if it cannot be written.
    """
    target = cache_dir() / name
    if target.is_dir():
        with suppress(OSError):  # another user's cache
            os.utime(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        write(unfinished)
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    make_room(target)
    return target


def remembered(
    kind: str,
    key: Mapping[str, Any],
    compute: Callable[[], T],
    *,
    about: str,
    write: Callable[[T, Path], None],
    read: Callable[[Path], T],
    size: Callable[[T], int] = lambda _: 0,
) -> T:
    """Return what `read` makes of the entry of `kind` and `key`, or else what `compute` returns, which `write` stores.

    `key` is JSON that determines the result, and `about` names the model to users. An entry whose files have changed
    since they were written is computed again. What has more bytes (`size`) than the cache may take, or cannot be
    written, is not stored.
    """
    name = f"{kind}-{_digest_of(key)}"
    folder = cache_dir() / name
    if folder.is_dir():
        try:
            _verify(folder, key)
            found = read(folder)
        except UNREADABLE as error:
            log.warning("cache_entry_damaged", folder=str(folder), error=str(error))
            shutil.rmtree(folder, ignore_errors=True)
        else:
            with suppress(OSError):
                os.utime(folder)
            log.info("taken_from_cache", what=kind, folder=str(folder))
            return found
    computed = compute()

    def fill(empty: Path) -> None:
        write(computed, empty)
        files = {path.name: _file_digest(path) for path in sorted(empty.iterdir())}
        (empty / MANIFEST).write_text(json.dumps({"about": about, "key": key, "files": files}, indent=1) + "\n")

    try:
        if size(computed) <= _limit():
            cached(name, fill)
    except OSError as error:
        log.warning("cache_not_written", folder=str(folder), error=error.strerror or str(error))
    return computed


def entries() -> list[Entry]:
    """Return all entries, the least recently used first."""
    return sorted(_entries(), key=lambda entry: entry.used)


def make_room(keep: Path) -> None:
    """Delete the least recently used entries until all take as much as the cache may, but not `keep`."""
    found = entries()
    taken = sum(entry.size for entry in found)
    for entry in found:
        if taken <= _limit(taken):
            break
        if entry.path != keep and time.time() - entry.used > IN_USE_SECONDS:
            delete(entry)
            taken -= entry.size


def delete(entry: Entry) -> None:
    """Delete an entry; a process that has opened its files can read them to the end."""
    shutil.rmtree(entry.path, ignore_errors=True)


def _entries() -> Iterator[Entry]:
    for path in cache_dir().glob("*-*"):
        if path.name.startswith(".") or not path.is_dir():
            continue
        kind = next((kind for kind in KINDS if path.name.startswith(f"{kind}-")), None)
        if kind is None:
            continue
        with suppress(OSError):  # deleted meanwhile
            size = sum(file.stat().st_size for file in path.iterdir())
            yield Entry(path, kind, _about(path), size, path.stat().st_mtime)


def _about(path: Path) -> str:
    try:
        return str(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["about"])
    except UNREADABLE:
        return ""


def _limit(taken: int | None = None) -> int:
    """Return the most bytes that all entries may take, where they take `taken`."""
    if taken is None:
        taken = sum(entry.size for entry in _entries())
    existing = next(folder for folder in (cache_dir(), *cache_dir().parents) if folder.is_dir())
    return min(MAX_BYTES, int(MAX_SHARE * (taken + shutil.disk_usage(existing).free)))


def _verify(folder: Path, key: Mapping[str, Any]) -> None:
    """Raise ValueError (or another of UNREADABLE) if a file is not what was written."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["key"] != key:
        raise ValueError("it is of something else")
    for name, digest in manifest["files"].items():
        if _file_digest(folder / name) != digest:
            raise ValueError(f"{name} has changed")


def _digest_of(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
