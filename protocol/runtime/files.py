"""Files that outlive a kill, a full disk, and others who remove or change them.

A line is whole or not there, and a file is replaced whole or not at all. Nothing is written through a symbolic link,
into a FIFO or into a device, so that somebody who may write in a folder cannot direct our text into another file.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

LARGEST_COPY_BYTES = 64_000_000
"""A longer file that was removed is begun anew: to copy it would hold everything up, and fill the disk again."""
_CHUNK_BYTES = 1 << 20
_Identity = tuple[int, int]


class Lines:
    """A file that lines are appended to, each by one write; by other processes too if it is `shared`.

    Where there is no room for a line, `append` raises OSError and none of it stays; or, if others write at that moment,
    a piece of it. After a torn line the next one begins on a line of its own, also where another process tore it.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path, self._shared = path, shared
        self._handle = _open(path)
        self._identity = _identity(os.fstat(self._handle))
        self._end = self._size
        self._copy_failed = False
        self.lost = False
        """Whether the last `restore` has left out what the file held."""

    @property
    def is_gone(self) -> bool:
        """Whether the path no longer leads to the file, which was removed, moved or replaced. For any thread."""
        try:
            return _identity(self._path.lstat()) != self._identity
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False  # such as a folder that may not be entered; the open file can still be written

    @property
    def is_changed(self) -> bool:
        """Whether others have removed, moved, replaced, cut or continued the file since the last line."""
        try:
            return self.is_gone or self._size != self._end
        except OSError:  # a file server has forgotten the open file
            return True

    @property
    def is_moved(self) -> bool:
        """Whether the file is gone and has another name now."""
        return self.is_gone and os.fstat(self._handle).st_nlink > 0

    @property
    def is_empty(self) -> bool:
        """Whether the file holds nothing."""
        return not self._size

    def append(self, line: str) -> None:
        """Append `line`, which ends with a newline."""
        data = line.encode("utf-8", "backslashreplace")
        if self._ends_amid_a_line():
            data = b"\n" + data
        size = self._size
        written = os.write(self._handle, data)
        if written < len(data):
            if self._size == size + written:
                os.ftruncate(self._handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end = size + written

    def restore(self) -> bool:
        """Bring the file back to its path, with what it held, if it is gone, and append there from now on.

        What it held is left out, and `lost` says so, if it is long or could not be copied the last time. Returns
        whether this process did so. What is at the path now is replaced; but if the file is shared, another process may
        have been first, and its file is used. Raises OSError.
        """
        self.lost = False
        if not self.is_gone:
            self._end = self._size
            return False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._shared and os.path.lexists(self._path):
            self.reopen()
            return False
        beside = _beside(self._path)
        try:
            handle = _create(beside, 0o666)
            if self._is_short and not self._copy_failed:
                self._copy_to(handle)
            else:
                os.close(handle)
                self.lost = True
            is_ours = _appear(beside, self._path, replacing=not self._shared)
        finally:
            beside.unlink(missing_ok=True)
        self.reopen()
        return is_ours

    def reopen(self) -> None:
        """Append to the file that is at the path now; it is made where there is none. Raises OSError."""
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
        except OSError:  # a file server has forgotten the open file
            return False

    def _copy_to(self, handle: int) -> None:
        self._copy_failed = True
        with os.fdopen(handle, "wb") as file:
            for chunk in self._content():
                file.write(chunk)
        self._copy_failed = False

    def _content(self) -> Iterator[bytes]:
        """What the open file holds, as far as it can be read: a file server may have forgotten a removed file."""
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

    def _ends_amid_a_line(self) -> bool:
        if self._ends_whole():
            return False
        time.sleep(0.001)  # another process may be in the middle of its write
        return not self._ends_whole()

    def _ends_whole(self) -> bool:
        size = self._size
        return not size or os.pread(self._handle, 1, size - 1) == b"\n"


class Document:
    """A file of one text that is only ever replaced; it can say whether others have removed or changed it."""

    def __init__(self, path: Path, *, durable: bool = True, mode: int = 0o666) -> None:
        self._path, self._durable, self._mode = path, durable, mode
        self._text: str | None = None
        self._seen: tuple[int, ...] | None = None

    @property
    def is_gone(self) -> bool:
        """Whether the file, which was written once, is not there. For any thread."""
        return self._seen is not None and self._look() is None

    @property
    def is_changed(self) -> bool:
        """Whether the file is no longer what was written last."""
        if self._text is None:
            return False
        found = self._look()
        if found == self._seen:
            return False
        if found is not None and self._holds(self._text):
            self._seen = found  # the same text in another file, such as a copy that was put back
            return False
        return True

    def write(self, text: str) -> None:
        """Replace the file by `text`. Raises OSError."""
        replace(self._path, text, durable=self._durable, mode=self._mode)
        self._text, self._seen = text, self._look()

    def write_again(self) -> None:
        """Replace the file by what was written last. Raises OSError."""
        if self._text is not None:
            self.write(self._text)

    def _look(self) -> tuple[int, ...] | None:
        """What identifies the file and its state; None where there is none."""
        try:
            found = self._path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return self._seen  # such as a folder that may not be entered
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


def replace(path: Path, text: str, *, durable: bool = True, mode: int = 0o666) -> None:
    """Replace `path` by `text`, whole or not at all; its folder is made where there is none.

    `durable`: should the power fail too, which waits for the disk. Raises OSError where it cannot be written; what was
    there before then stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        with os.fdopen(_create(beside, mode), "wb") as file:
            file.write(_encoded(text))
            file.flush()
            if durable:
                os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _identity(found: os.stat_result) -> _Identity:
    return found.st_dev, found.st_ino


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _create(path: Path, mode: int) -> int:
    """The handle of a new file; one that a killed process of our number has left is removed."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def _open(path: Path) -> int:
    """The handle of a regular file, to append to and read from; it is made where there is none."""
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


def _appear(beside: Path, path: Path, *, replacing: bool) -> bool:
    """Give the file `beside` the name `path`, unless that is taken and we are not `replacing`: whether it was given."""
    if replacing:
        beside.replace(path)
        return True
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        beside.rename(path)
    return True
