"""An export folder that appears whole or not at all, and never takes the place of anything but an older export."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError

from protocol.errors import ModelError, UsageError
from protocol.formats import Format, Formats

MARK = "selfpruner.json"
"""The file that every export folder has, and by which an older one is known."""


class ExportError(UsageError):
    """The folder cannot be written where it was asked for."""


def formats_in(folder: Path) -> Formats:
    """The formats of an exported folder, by what it says of itself. Raises ModelError where it is none."""
    mark = folder / MARK
    if not folder.is_dir():
        raise ModelError(f"there is no folder {str(folder)!r}; pass one that `selfpruner export` wrote")
    if not mark.is_file():
        raise ModelError(f"{str(folder)!r} is no folder that `selfpruner export` wrote: it has no {MARK}")
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


def check_target(target: Path, *, force: bool) -> None:
    """Raise ExportError where an export to `target` would be refused, before anything that takes time is done."""
    target = target.expanduser().resolve()
    if not target.exists():
        _check_parent(target)
        return
    if not target.is_dir():
        raise ExportError(f"{target} is a file; pass a folder that is not there yet")
    if any(target.iterdir()) and not (target / MARK).is_file():
        raise ExportError(f"the folder {target} exists and is no export of Self-Pruner; pass another name")
    if not force:
        raise ExportError(f"the folder {target} exists; pass another one, or --force to replace it")


def write_folder(target: Path, write: Callable[[Path], None], *, force: bool) -> None:
    """Make the folder `target`: `write` fills an empty hidden one beside it, which is renamed when complete.

    Missing parent folders are made. With `force` an older export at `target` stays until the new one is complete.
    Raises ExportError where `target` is taken or cannot be written; then nothing has changed.
    """
    target = target.expanduser().resolve()
    check_target(target, force=force)
    unfinished = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        write(unfinished)
        _share(unfinished)
        _put(unfinished, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(f"the folder {target} cannot be written ({reason})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_parent(target: Path) -> None:
    """Raise ExportError unless `target` can be made below the nearest folder that is there."""
    nearest = next(parent for parent in target.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        code = errno.EACCES if nearest.is_dir() else errno.ENOTDIR
        raise ExportError(f"the folder {target} cannot be written ({os.strerror(code)})")


def _beside(target: Path) -> Path:
    """A name on the same file system that nobody uses, so that renaming is one step."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")


def _share(folder: Path) -> None:
    """Give files the permissions that the folder was made with: safetensors writes for its owner alone."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)


def _put(finished: Path, target: Path) -> None:
    """Rename `finished` to `target`; an older folder there is moved aside first, and back where that fails."""
    if not target.exists():
        finished.rename(target)
        return
    older = _beside(target)
    target.rename(older)
    try:
        finished.rename(target)
    except BaseException:  # a signal too
        older.rename(target)
        raise
    shutil.rmtree(older, ignore_errors=True)
