"""Locks: one process at a time; a file system that knows none stops nobody; what else goes wrong is one sentence."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from daemon.local.folder_lock import is_running, lock_folder
from gpu_worker.export.folder import ExportError, write_folder
from protocol.errors import UsageError
from protocol.results.formats import FACTS
from protocol.runtime.locks import try_lock


def failing(code: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return flock


def write_one(folder: Path) -> None:
    (folder / FACTS).write_text("new")


def test_a_lock_is_one_process_s_until_it_is_closed(tmp_path: Path) -> None:
    lock = tmp_path / "a" / "b" / "lock"
    handle = try_lock(lock)
    assert handle is not None and try_lock(lock) is None
    os.close(handle)
    again = try_lock(lock)
    assert again is not None
    os.close(again)


def test_a_lock_that_its_owner_removes_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, opened = tmp_path / "lock", os.open

    def removed(path: Path, *flags: int) -> int:
        handle = opened(path, *flags)
        monkeypatch.undo()
        lock.unlink()
        return handle

    monkeypatch.setattr(os, "open", removed)
    handle = try_lock(lock)
    assert handle is not None and os.path.samestat(os.fstat(handle), lock.stat())
    os.close(handle)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("fcntl.flock", failing(code))
    with capture_logs() as logs:
        write_folder(tmp_path / "out", write_one, force=False)
        with lock_folder(tmp_path / "search"):
            assert not is_running(tmp_path / "search")
    assert (tmp_path / "out" / FACTS).read_text() == "new"
    assert [line["event"] for line in logs] == ["file_system_without_locks"] * 2


def test_another_error_of_a_lock_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", failing(errno.EIO))
    with pytest.raises(UsageError, match=r"run\.folder cannot be written: .*Input/output error"), lock_folder(tmp_path):
        pass
    with pytest.raises(ExportError, match=r"cannot be written \(Input/output error\)"):
        write_folder(tmp_path / "out", write_one, force=False)
