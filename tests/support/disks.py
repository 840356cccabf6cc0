"""Disks that tests can fill."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILLER = "filler"


class SmallDisk:
    """A real file system of two megabytes in `folder`; needs root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self) -> bool:
        self.folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(self) -> None:
        """Fill the disk to the last byte."""
        with (self.folder / FILLER).open("wb", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        (self.folder / FILLER).unlink(missing_ok=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class LimitedFiles:
    """A limit on the size of this process's files, which looks like a full disk and needs no rights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self) -> bool:
        self.folder.mkdir()
        return True

    def fill(self, largest: int = 0) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def free(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    def unmount(self) -> None:
        self.free()


Disk = SmallDisk | LimitedFiles


@contextmanager
def mounted(disk: Disk) -> Iterator[Disk | None]:
    """Return the disk; None if we may not create it."""
    if not disk.mount():
        yield None
        return
    try:
        yield disk
    finally:
        disk.unmount()


@contextmanager
def full_at(disk: LimitedFiles, path: Path, more: int) -> Iterator[None]:
    """The file at `path` may grow by `more` bytes in the block."""
    disk.fill(path.stat().st_size + more)
    try:
        yield
    finally:
        disk.free()
