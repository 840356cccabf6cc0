"""Writes an export folder atomically, and never replaces anything but an older export."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_args

from protocol.errors import ModelError, UsageError
from protocol.results.formats import FACTS, Format, Formats
from protocol.runtime.locks import try_lock

UNFINISHED, OLDER = "unfinished", "older"
"""Hidden folders beside the target while it is written: the new content, and the previous export."""
LOCK = "lock"


class ExportError(UsageError):
    """The folder cannot be written at the requested path."""


def formats_in(folder: Path) -> Formats:
    """Return the formats that an exported folder records. Raises ModelError if it is not an exported folder."""
    mark = folder / FACTS
    if not folder.is_dir():
        raise ModelError(f"there is no folder {str(folder)!r}; pass one that `selfpruner export` wrote")
    if not mark.is_file():
        raise ModelError(f"{str(folder)!r} was not written by `selfpruner export`: it has no {FACTS}")
    try:
        written = json.loads(mark.read_bytes())
        found = tuple(written["formats"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{str(mark)!r} does not say in which format the model was exported") from error
    for each in found:
        if each not in get_args(Format):
            known = ", ".join(get_args(Format))
            raise ModelError(f"{str(mark)!r} names the unknown format {each!r}; there are {known}")
    if not found:
        raise ModelError(f"{str(mark)!r} names no format")
    return found


def check_weights(folder: Path, formats: Formats) -> None:
    """Raise ModelError if weight files of an exported folder are missing."""
    if not {"hf", "padded"} & set(formats):
        return
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        try:
            names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{str(index)!r} does not say which files hold the weights") from error
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ModelError(f"{str(folder)!r} lacks weights: {missing[0]} is missing")


def check_target(target: Path, *, force: bool) -> None:
    """Raise ExportError if an export to `target` would be refused; call this before the slow stages.

    Removes files that a killed process left beside the target, and restores an older export that it had moved aside.
    """
    target = target.expanduser().resolve()
    if not target.name:
        raise ExportError(f"the folder {target} cannot be replaced: name a folder in it")
    with _writing(target):
        if any(_sibling(target, what).exists() for what in (UNFINISHED, OLDER)):
            with _locked(target):
                pass
        _check_free(target, force=force)


def write_folder(target: Path, write: Callable[[Path], None], *, force: bool) -> None:
    """Create the folder `target`: `write` fills a hidden empty folder beside it, which is renamed when complete.

    Creates missing parent folders. With `force`, an older export at `target` stays until the new export is complete.
    Raises ExportError, and changes nothing, if `target` exists, is being written by another process or cannot be
    written.
    """
    target = target.expanduser().resolve()
    check_target(target, force=force)
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target) as unfinished:
            _check_free(target, force=force)
            content = unfinished / "content"
            content.mkdir()
            write(content)
            _set_permissions(content)
            _move_into_place(content, target)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Convert errors of the file system into ExportError."""
    from safetensors import SafetensorError  # the search process reads folders without this package

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(f"the folder {target} cannot be written ({reason})") from error


def _check_free(target: Path, *, force: bool) -> None:
    _check_parent(target)
    if not target.exists():
        return
    if target.is_mount():
        raise ExportError(f"the folder {target} is a mount point, which cannot be replaced; pass a folder in it")
    if not target.is_dir():
        raise ExportError(f"{target} is a file; pass a folder that does not exist yet")
    if any(target.iterdir()) and not (target / FACTS).is_file():
        raise ExportError(f"the folder {target} exists and is not an export of Self-Pruner; pass another name")
    if not force:
        raise ExportError(f"the folder {target} exists; pass another one, or --force to replace it")


def _check_parent(target: Path) -> None:
    """Raise ExportError unless the nearest existing parent of `target` is a writable folder."""
    nearest = next(parent for parent in target.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        code = errno.EACCES if nearest.is_dir() else errno.ENOTDIR
        raise ExportError(f"the folder {target} cannot be written ({os.strerror(code)})")


def _sibling(target: Path, what: str) -> Path:
    """Return a hidden path beside `target`, on the same file system so that renaming is atomic."""
    return target.with_name(f".{target.name}.selfpruner-{what}")


@contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """Lock and yield the hidden folder in which `target` is written; it is empty except for its lock.

    The lock ends with the process. Removes files that a killed process left, and removes the folder on exit. Raises
    ExportError if another process is writing there.
    """
    unfinished = _sibling(target, UNFINISHED)
    lock = unfinished / LOCK
    handle = try_lock(lock)  # a file, because NFS cannot lock folders
    if handle is None:
        raise ExportError(f"the folder {target} is being written by another process")
    try:
        _clear(unfinished)
        _recover(target, unfinished)
        yield unfinished
    finally:
        # Remove the lock last, so that the next process finds no files of this process.
        _clear(unfinished)
        lock.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):
            unfinished.rmdir()


def _clear(unfinished: Path) -> None:
    """Remove everything except the lock."""
    for path in unfinished.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path, ignore_errors=True)


def _recover(target: Path, unfinished: Path) -> None:
    """Restore an older export that was moved aside, or remove it if the new export is in place."""
    older = _sibling(target, OLDER)
    if not older.exists():
        return
    if target.exists():
        # Rename it before removing its files, because a folder with the name `older` must always be complete.
        older.rename(unfinished / OLDER)
        shutil.rmtree(unfinished / OLDER, ignore_errors=True)
    else:
        older.rename(target)


def _set_permissions(folder: Path) -> None:
    """Give files the folder's read and write permissions, because safetensors writes files for the owner only."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)


def _move_into_place(content: Path, target: Path) -> None:
    """Rename `content` to `target`; an older folder is moved aside first, and restored if renaming fails."""
    older = _sibling(target, OLDER)
    try:
        if target.exists():
            target.rename(older)
        content.rename(target)
    except BaseException:  # also for signals
        if older.exists() and not target.exists():
            older.rename(target)
        raise
    _recover(target, content.parent)
