"""Files that one process holds at a time; its end, however it comes, lets go of them."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

import structlog

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What file systems say that know no locks."""

log = structlog.get_logger()


def hold(lock: Path) -> int | None:
    """The handle of the file `lock`, ours until it is closed; None where another process holds it.

    It is made with its folder, and whoever holds it may remove both. On a file system without locks nobody is kept out,
    which the log says. Raises OSError.
    """
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # its owner ended just now
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
        os.close(handle)  # of a lock that its owner has removed


def _locked(handle: int, lock: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        log.warning("file_system_without_locks", folder=str(lock.parent), reason=error.strerror)
    return True
