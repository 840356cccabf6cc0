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
LEFT_SECONDS = 86_400.0
"""A hidden folder of this age was left by a process that was killed: a GGUF file is unpacked for hours at most."""
STORED_SECONDS = 1800.0
"""The same for an entry that `remembered` stores, each of whose files is written within minutes."""
UNFINISHED = "-unfinished"
MANIFEST = "entry.json"
"""File of an entry that says what it holds, with a digest of each file."""
READ_BYTES = 2**22
KINDS = ("calibration", "features", "gguf", "predictions", "self-text", "sensitivity", "tokens")

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
        _touch(target)
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
    with suppress(OSError):
        make_room()
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

    `key` is JSON that determines the result, and `about` names the model to users. An entry that has changed since it
    was written, or cannot be read, is computed again. What has no room (`size` is its bytes), cannot be written, or is
    being written by another process, is not stored. Only `compute` can raise.
    """
    try:
        folder = cache_dir() / f"{kind}-{_digest_of(key)}"
        is_there = folder.is_dir()
    except (OSError, RuntimeError) as error:  # no home folder, or one that this user may not enter
        log.warning("cache_not_written", folder="", error=str(error))
        return compute()
    if is_there:
        try:
            _verify(folder, key)
            found = read(folder)
        except Exception as error:  # noqa: BLE001  (libraries raise many kinds for a damaged file)
            log.warning("cache_entry_damaged", folder=str(folder), error=str(error))
            _remove(folder)
        else:
            _touch(folder)
            log.info("taken_from_cache", what=kind, folder=str(folder))
            return found
    computed = compute()
    try:
        if size(computed) <= make_room(size(computed)):
            _store(folder, {"about": about, "key": key}, lambda empty: write(computed, empty))
    except Exception as error:  # noqa: BLE001  (the result is known: nothing that happens here may lose it)
        log.warning("cache_not_written", folder=str(folder), error=str(error))
    return computed


def _store(folder: Path, manifest: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Write an entry, unless another process has written, or is writing, the same one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    try:
        unfinished.mkdir()
    except FileExistsError:
        return
    try:
        if folder.is_dir():  # written while this process computed
            return
        write(unfinished)
        files = {path.name: _file_digest(path) for path in sorted(unfinished.iterdir())}
        (unfinished / MANIFEST).write_text(json.dumps(manifest | {"files": files}, indent=1) + "\n")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def entries() -> list[Entry]:
    """Return all entries, the least recently used first."""
    return sorted(_entries(), key=lambda entry: entry.used)


def make_room(wanted: int = 0) -> int:
    """Delete the least recently used entries until there is room for `wanted` more bytes; return the bytes there are.

    Entries that were used within IN_USE_SECONDS stay. What killed processes have left is deleted after a while.
    """
    found = entries()
    for left in cache_dir().glob(".*-*"):
        with suppress(OSError):
            longest = STORED_SECONDS if left.name.endswith(UNFINISHED) else LEFT_SECONDS
            if left.name.startswith(tuple(f".{kind}-" for kind in KINDS)) and _age(left) > longest:
                _remove(left)
    taken = sum(entry.size for entry in found)
    for entry in found:
        if taken + wanted <= _limit(taken):
            break
        if time.time() - entry.used > IN_USE_SECONDS:
            delete(entry)
            taken -= entry.size
    return min(_limit(taken) - taken, _free() // 2)


def delete(entry: Entry) -> None:
    """Delete an entry; a process that has opened its files can read them to the end."""
    _remove(entry.path)


def _remove(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that no process finds it incomplete."""
    hidden = folder.with_name(f".{folder.name.lstrip('.')}-{os.getpid()}-deleted")
    with suppress(OSError):
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _touch(folder: Path) -> None:
    with suppress(OSError):  # another user's cache
        os.utime(folder)


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


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
    except Exception:  # noqa: BLE001  (only a name for users)
        return ""


def _limit(taken: int) -> int:
    """Return the most bytes that all entries may take, where they take `taken`."""
    return min(MAX_BYTES, int(MAX_SHARE * (taken + _free())))


def _free() -> int:
    """Return the free bytes of the disk."""
    folder = cache_dir()
    return shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.is_dir())).free


def _verify(folder: Path, key: Mapping[str, Any]) -> None:
    """Raise an error if a file is not what was written."""
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
