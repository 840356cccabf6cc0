"""Files that outlive a kill and a full disk: lines that are whole or not there, files replaced whole or not at all."""

import errno
import os
from pathlib import Path


class Lines:
    """A file that lines are appended to, each by one write, also by other processes.

    Where there is no room for a line, `append` raises OSError and none of it stays; or, if others write at that moment,
    a piece of it, and the next line then begins on a new one.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._is_torn = _ends_amid_a_line(path)

    def append(self, line: str) -> None:
        """Append `line`, which ends with a newline."""
        data = line.encode("utf-8", "backslashreplace")
        if self._is_torn:
            data = b"\n" + data
        size = self._size
        written = self._file.write(data) or 0
        if written == len(data):
            self._is_torn = False
            return
        if written and self._size == size + written:
            os.ftruncate(self._file.fileno(), size)
        elif written:
            self._is_torn = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @property
    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def replace(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` by `text`, whole or not at all; `durable`: should the power fail too, which waits for the disk.

    Raises OSError where it cannot be written; what was there before then stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _ends_amid_a_line(path: Path) -> bool:
    """Whether a kill has torn the last line of the file."""
    if not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
