"""A folder that cannot be written (its disk is full): told once when it begins and once when it ends."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

log = structlog.get_logger()


class Trouble:
    """Which files of a folder could not be written the last time that was tried. Of all threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._failing: set[str] = set()
        self._lock = threading.Lock()

    @property
    def files(self) -> list[str]:
        """Their names."""
        with self._lock:
            return sorted(self._failing)

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Write the file `name` in the block; an OSError of it is told, if it is the first, and goes no further."""
        try:
            yield
        except OSError as error:
            with self._lock:
                first = not self._failing
                self._failing.add(name)
            if first:
                log.error("folder_not_written", folder=str(self._folder), file=name, error=str(error))
            return
        with self._lock:
            last = self._failing == {name}
            self._failing.discard(name)
        if last:
            log.info("folder_written_again", folder=str(self._folder))
