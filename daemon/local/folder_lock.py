"""The lock of a search's folder, which only one `selfpruner run` may use at a time."""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import SearchExistsError, UsageError
from protocol.runtime.locks import try_lock

LOCK = "lock"
LOOK_SECONDS = 2.0
"""Interval between checks whether the lock file was removed."""


class FolderLock:
    """The lock of one folder, held by this process."""

    def __init__(self, folder: Path, handle: int) -> None:
        self._folder, self._handle = folder, handle

    async def keep_forever(self) -> None:
        """Lock again whenever the lock file, or the whole folder, was removed.

        Raises SearchExistsError if another run has locked it first.
        """
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._is_there():
                with contextlib.suppress(OSError):  # a full disk; it is tried again
                    self._take_again()

    def close(self) -> None:
        """Release the lock."""
        os.close(self._handle)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._handle), (self._folder / LOCK).lstat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # a passing error of the file system; a second lock would conflict with our own
            return True

    def _take_again(self) -> None:
        handle = try_lock(self._folder / LOCK)
        if handle is None:
            raise SearchExistsError(f"the folder {self._folder} was removed, and another run of the search uses it now")
        os.close(self._handle)
        self._handle = handle


@contextmanager
def lock_folder(folder: Path) -> Iterator[FolderLock]:
    """Lock the folder of a search. Raises SearchExistsError if another `selfpruner run` uses it."""
    try:
        handle = try_lock(folder / LOCK)
    except OSError as error:
        raise UsageError(f"run.folder cannot be written: {error}") from error
    if handle is None:
        raise SearchExistsError(f"the search {folder.name!r} is already running in {folder}")
    held = FolderLock(folder, handle)
    try:
        yield held
    finally:
        held.close()


def is_running(folder: Path) -> bool:
    """Whether a `selfpruner run` of the search in `folder` is alive; False if the file system has no locks."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(handle)
    return False
