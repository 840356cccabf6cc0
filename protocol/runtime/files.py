"""Files that survive a kill, a full disk, and deletion or changes by other programs.

A line is written whole or not at all, and a file is replaced atomically. Nothing is written through a symbolic link,
into a FIFO or into a device, so that another user with write access to a folder cannot redirect our text to another
file.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LARGEST_COPY_BYTES = 64_000_000
"""Deleted files above this size are started anew, because a copy would take long and could fill the disk again."""
_CHUNK_BYTES = 1 << 20
_Identity = tuple[int, int]


class AppendOnlyFile:
    """A file to which lines are appended, each by one write. Several processes append to it if it is `shared`.

    If there is no room for a line, `append` raises OSError and leaves nothing of the line in the file (or a part, if
    another process writes at that moment). After a partial line, which another process may have written, the next line
    starts with a newline.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path, self._shared = path, shared
        self._handle = _open(path)
        self._identity = _identity(os.fstat(self._handle))
        self._end = self._size
        self._copy_failed = False
        self.lost = False
        """Whether the last `restore` lost the file's earlier content."""

    @property
    def is_gone(self) -> bool:
        """Whether the file was deleted, moved or replaced, so that the path no longer leads to it. Thread-safe."""
        try:
            return _identity(self._path.lstat()) != self._identity
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False  # such as a folder without permission; the open file can still be written

    @property
    def is_changed(self) -> bool:
        """Whether another program has deleted, moved, replaced, truncated or extended the file since the last line."""
        try:
            return self.is_gone or self._size != self._end
        except OSError:  # a file server has lost the open file
            return True

    @property
    def is_moved(self) -> bool:
        """Whether the file now has another name."""
        return self.is_gone and os.fstat(self._handle).st_nlink > 0

    @property
    def is_empty(self) -> bool:
        """Whether the file is empty."""
        return not self._size

    def append(self, line: str) -> None:
        """Append `line`, which must end with a newline."""
        data = line.encode("utf-8", "backslashreplace")
        if self._ends_with_partial_line():
            data = b"\n" + data
        size = self._size
        written = os.write(self._handle, data)
        if written < len(data):
            if self._size == size + written:
                os.ftruncate(self._handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end = size + written

    def restore(self) -> bool:
        """Restore a missing file with its content, and append to it from now on.

        The content is lost, and `lost` is set, if it is large or could not be copied the last time. Another file at the
        path is replaced, unless this file is shared. Then another process has restored the file, and its file is used.
        Returns whether this process restored the file. Raises OSError.
        """
        self.lost = False
        if not self.is_gone:
            self._end = self._size
            return False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._shared and os.path.lexists(self._path):
            self.reopen()
            return False
        temporary = _temporary_path(self._path)
        try:
            handle = _create(temporary, 0o666)
            if self._is_short and not self._copy_failed:
                self._copy_to(handle)
            else:
                os.close(handle)
                self.lost = True
            was_created = _rename(temporary, self._path, replacing=not self._shared)
        finally:
            temporary.unlink(missing_ok=True)
        self.reopen()
        return was_created

    def reopen(self) -> None:
        """Use the file that is now at the path from now on; create it if missing. Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = _open(self._path)
        os.close(self._handle)
        self._handle = handle
        self._identity = _identity(os.fstat(handle))
        self._end = self._size
        self._copy_failed = False

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    @property
    def _size(self) -> int:
        return os.fstat(self._handle).st_size

    @property
    def _is_short(self) -> bool:
        try:
            return self._size <= LARGEST_COPY_BYTES
        except OSError:  # a file server has lost the open file
            return False

    def _copy_to(self, handle: int) -> None:
        self._copy_failed = True
        with os.fdopen(handle, "wb") as file:
            for chunk in self._content():
                file.write(chunk)
        self._copy_failed = False

    def _content(self) -> Iterator[bytes]:
        """Yield the content of the open file as far as it is readable. A file server may have lost a deleted file."""
        offset = 0
        while True:
            try:
                chunk = os.pread(self._handle, _CHUNK_BYTES, offset)
            except OSError:
                return
            if not chunk:
                return
            yield chunk
            offset += len(chunk)

    def _ends_with_partial_line(self) -> bool:
        if self._ends_with_newline():
            return False
        time.sleep(0.001)  # another process may be in the middle of its write
        return not self._ends_with_newline()

    def _ends_with_newline(self) -> bool:
        size = self._size
        return not size or os.pread(self._handle, 1, size - 1) == b"\n"


class AtomicFile:
    """A text file that is only replaced as a whole, and detects deletion and changes by other programs."""

    def __init__(self, path: Path, *, durable: bool = True, mode: int = 0o666) -> None:
        self._path, self._durable, self._mode = path, durable, mode
        self._text: str | None = None
        self._expected: tuple[int, ...] | None = None

    @property
    def is_gone(self) -> bool:
        """Whether the file was written before and is missing now. Thread-safe."""
        return self._expected is not None and self._fingerprint() is None

    @property
    def is_changed(self) -> bool:
        """Whether the file differs from the text written last."""
        if self._text is None:
            return False
        found = self._fingerprint()
        if found == self._expected:
            return False
        if found is not None and self._holds(self._text):
            self._expected = found  # the same text in another file, such as a restored copy
            return False
        return True

    def write(self, text: str) -> None:
        """Replace the file by `text`. Raises OSError."""
        write_atomically(self._path, text, durable=self._durable, mode=self._mode)
        self._text, self._expected = text, self._fingerprint()

    def write_again(self) -> None:
        """Replace the file by the text written last. Raises OSError."""
        if self._text is not None:
            self.write(self._text)

    def _fingerprint(self) -> tuple[int, ...] | None:
        """Return values that identify the file and its state; None if there is no file."""
        try:
            found = self._path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return self._expected  # such as a folder without permission
        return found.st_mode, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _holds(self, text: str) -> bool:
        data = _encoded(text)
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        with os.fdopen(handle, "rb") as file:
            is_regular = stat.S_ISREG(os.fstat(handle).st_mode)
            return is_regular and file.read(len(data) + 1) == data


def write_atomically(path: Path, text: str, *, durable: bool = True, mode: int = 0o666) -> None:
    """Replace the content of `path` by `text` atomically; create its folder if missing.

    `durable` waits until the text is on the disk, so that it survives a power failure. Raises OSError if the text
    cannot be written; the old file is then kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    try:
        with os.fdopen(_create(temporary, mode), "wb") as file:
            file.write(_encoded(text))
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def open_log(path: Path) -> BinaryIO:
    """Open the log of another program for appending; create it if missing.

    Raises OSError for anything but a regular file, such as a symbolic link or a FIFO.
    """
    return os.fdopen(_open(path), "ab", buffering=0)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _identity(found: os.stat_result) -> _Identity:
    return found.st_dev, found.st_ino


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _create(path: Path, mode: int) -> int:
    """Create a file and return its handle. A leftover of a killed process with the same id is deleted."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def _open(path: Path) -> int:
    """Open a regular file for appending and reading and return its handle; create it if missing."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return handle


def _rename(temporary: Path, path: Path, *, replacing: bool) -> bool:
    """Rename `temporary` to `path`. Unless `replacing`, an existing file is kept. Returns whether it was renamed."""
    if replacing:
        temporary.replace(path)
        return True
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        temporary.rename(path)
    return True
