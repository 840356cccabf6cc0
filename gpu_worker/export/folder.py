"""An export folder that appears whole or not at all, and never takes the place of anything but an older export."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError

from protocol.errors import ModelError, UsageError
from protocol.results.formats import FACTS, Format, Formats
from protocol.runtime.locks import hold

UNFINISHED, OLDER = "unfinished", "older"
"""What lies beside a folder while it is written: its new content, and what was there before."""
LOCK = "lock"


class ExportError(UsageError):
    """The folder cannot be written where it was asked for."""


def formats_in(folder: Path) -> Formats:
    """The formats of an exported folder, by what it says of itself. Raises ModelError where it is none."""
    mark = folder / FACTS
    if not folder.is_dir():
        raise ModelError(f"there is no folder {str(folder)!r}; pass one that `selfpruner export` wrote")
    if not mark.is_file():
        raise ModelError(f"{str(folder)!r} is no folder that `selfpruner export` wrote: it has no {FACTS}")
    try:
        written = json.loads(mark.read_bytes())
        found = tuple(written["formats"] if "formats" in written else [written["format"]])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{str(mark)!r} does not say in which format the model was exported") from error
    for each in found:
        if each not in get_args(Format):
            known = ", ".join(get_args(Format))
            raise ModelError(f"{str(mark)!r} names the unknown format {each!r}; there are {known}")
    return found


def check_weights(folder: Path, formats: Formats) -> None:
    """Raise ModelError where an exported folder has lost the files that transformers loads its weights from."""
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
        raise ModelError(f"{str(folder)!r} has lost weights: {missing[0]} is not there")


def check_target(target: Path, *, force: bool) -> None:
    """Raise ExportError where an export to `target` would be refused, before anything that takes time is done.

    What a killed process left beside it is cleared away, and an older export that it had moved aside is put back.
    """
    target = target.expanduser().resolve()
    with _writing(target):
        if any(_sibling(target, what).exists() for what in (UNFINISHED, OLDER)):
            with _locked(target):
                pass
        _check_free(target, force=force)


def write_folder(target: Path, write: Callable[[Path], None], *, force: bool) -> None:
    """Make the folder `target`: `write` fills an empty one, hidden beside it, which is renamed when complete.

    Missing parent folders are made. With `force` an older export at `target` stays until the new one is complete.
    Raises ExportError where `target` is taken, is being written by another process or cannot be written; then nothing
    has changed.
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
    """Whatever the file system says meanwhile is an ExportError."""
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
        raise ExportError(f"{target} is a file; pass a folder that is not there yet")
    if any(target.iterdir()) and not (target / FACTS).is_file():
        raise ExportError(f"the folder {target} exists and is no export of Self-Pruner; pass another name")
    if not force:
        raise ExportError(f"the folder {target} exists; pass another one, or --force to replace it")


def _check_parent(target: Path) -> None:
    """Raise ExportError unless `target`, and what is hidden beside it, can be made in the nearest folder there is."""
    nearest = next(parent for parent in target.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        code = errno.EACCES if nearest.is_dir() else errno.ENOTDIR
        raise ExportError(f"the folder {target} cannot be written ({os.strerror(code)})")


def _sibling(target: Path, what: str) -> Path:
    """On the same file system, so that renaming is one step; always the same, so that what a kill leaves is found."""
    return target.with_name(f".{target.name}.selfpruner-{what}")


@contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """The hidden folder in which `target` is written: ours alone, empty but for its lock, and gone afterwards.

    The end of the process frees the lock. What a killed one left is cleared away. Raises ExportError where another
    process writes there.
    """
    unfinished = _sibling(target, UNFINISHED)
    lock = unfinished / LOCK
    handle = hold(lock)  # a file, for NFS locks no folders
    if handle is None:
        raise ExportError(f"the folder {target} is being written by another process")
    try:
        _clear(unfinished)
        _recover(target, unfinished)
        yield unfinished
    finally:
        # The lock goes last: whoever comes then finds nothing of ours.
        _clear(unfinished)
        lock.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):
            unfinished.rmdir()


def _clear(unfinished: Path) -> None:
    """Remove all that is there but the lock."""
    for path in unfinished.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path, ignore_errors=True)


def _recover(target: Path, unfinished: Path) -> None:
    """Put back an older export that was moved aside, or where the new one has taken its place, do away with it."""
    older = _sibling(target, OLDER)
    if not older.exists():
        return
    if target.exists():
        # Renamed before anything of it is removed: what has that name is whole.
        older.rename(unfinished / OLDER)
        shutil.rmtree(unfinished / OLDER, ignore_errors=True)
    else:
        older.rename(target)


def _set_permissions(folder: Path) -> None:
    """Give files the permissions that the folder was made with: safetensors writes for its owner alone."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)


def _move_into_place(content: Path, target: Path) -> None:
    """Rename `content` to `target`; an older folder there is moved aside first, and back where that fails."""
    older = _sibling(target, OLDER)
    try:
        if target.exists():
            target.rename(older)
        content.rename(target)
    except BaseException:  # a signal too
        if older.exists() and not target.exists():
            older.rename(target)
        raise
    _recover(target, content.parent)
