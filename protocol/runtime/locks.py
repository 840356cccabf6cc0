"""File locks that are released when their process ends, however it ends."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

import structlog

UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Error numbers of file systems without locks."""

log = structlog.get_logger()


def try_lock(lock: Path) -> int | None:
    """Lock the file `lock`. Returns its handle, or None if another process holds it. Closing the handle unlocks it.

    The file and its folder are created if missing, and the holder may delete both. On a file system without locks, a
    warning is logged and no process is kept out. Raises OSError.
    """
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # its holder has just deleted the folder
            continue
        try:
            if not _locked(handle, lock):
                os.close(handle)
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), lock.stat()):
                    return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)  # the earlier holder has deleted the file in between


def _locked(handle: int, lock: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("file_system_without_locks", folder=str(lock.parent), reason=error.strerror)
    return True
