"""Errors of a search's folder: files that cannot be written (a full disk), or that another program has changed."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

log = structlog.get_logger()


class FolderErrors:
    """Tracks the files of a folder that could not be written, or were changed. Logs new problems, and their end.

    Thread-safe.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._failing: set[str] = set()
        self._changed: set[str] = set()
        self._watched: dict[str, Callable[[], bool]] = {}
        self._lock = threading.Lock()

    @property
    def files(self) -> list[str]:
        """The names of the files whose last write failed."""
        with self._lock:
            return sorted(self._failing)

    def watch(self, name: str, is_gone: Callable[[], bool]) -> None:
        """Watch the file `name`. `is_gone` returns whether it was removed, and may be called from any thread."""
        with self._lock:
            self._watched[name] = is_gone

    def changed(self, names: Iterable[str]) -> None:
        """Log that the files `names` were changed, together with all watched files that were removed.

        Each file is logged once until it is written again.
        """
        with self._lock:
            found = {*names, *(name for name, is_gone in self._watched.items() if is_gone())} - self._changed
            self._changed |= found
        if found:
            log.warning("folder_changed", folder=str(self._folder), files=sorted(found))

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Write the file `name` in the block. An OSError is suppressed, and logged if no other file was failing."""
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
            was_troubled = bool(self._failing or self._changed)
            self._failing.discard(name)
            self._changed.discard(name)
            is_over = was_troubled and not (self._failing or self._changed)
        if is_over:
            log.info("folder_written_again", folder=str(self._folder))
