"""The transcript: the file of all questions to the LLM and their answers. Lines wait in memory if the disk is full."""

import json
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from daemon.state.folder_errors import FolderErrors
from protocol.runtime.files import AppendOnlyFile

KEPT = 64_000_000
"""Maximum number of characters kept in memory while they cannot be written."""

log = structlog.get_logger()


def questions_of(path: Path, label: str, most: int) -> list[dict[str, Any]]:
    """Return the last `most` records of the transcript `path` whose label begins with `label`.

    Damaged lines are skipped, and a file that cannot be read holds none.
    """
    found: deque[dict[str, Any]] = deque(maxlen=most)
    wanted = json.dumps({"label": label}, ensure_ascii=False)[1:-2]  # the text of a line that can match
    with suppress(OSError), path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if wanted not in line:
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and str(record.get("label", "")).startswith(label):
                found.append(record)
    return list(found)


class TranscriptFile:
    """Appends to the transcript. The newest lines wait in memory while the disk is full."""

    def __init__(self, path: Path, folder_errors: FolderErrors) -> None:
        self._folder_errors, self._name = folder_errors, path.name
        self._lines = AppendOnlyFile(path)
        folder_errors.watch(self._name, lambda: self._lines.is_gone)
        self._waiting: deque[str] = deque()
        self._size = 0
        self._dropped = 0

    def add(self, line: str) -> None:
        """Append `line` after the waiting lines. If it cannot be written, it waits too."""
        self._waiting.append(line)
        self._size += len(line)
        self.write()
        while self._size > KEPT:
            self._take()
            self._dropped += 1

    def write(self) -> None:
        """Write the waiting lines. When all are written, log how many lines were dropped earlier.

        A removed file is restored with its contents, unless it was too long. Lines that another program cut off are
        lost.
        """
        with self._folder_errors.writing(self._name):
            if self._lines.is_changed:
                self._folder_errors.changed([self._name])
                if self._lines.restore() and self._lines.lost:
                    log.warning("transcript_begun_anew", file=self._name)
            while self._waiting:
                self._lines.append(self._waiting[0])
                self._take()
        if self._dropped and not self._waiting:
            self._log_missing()

    @property
    def is_empty(self) -> bool:
        """Whether the file holds no line."""
        return self._lines.is_empty

    def close(self) -> None:
        """Write the waiting lines, or log how many are missing, and close the file."""
        self.write()
        self._dropped += len(self._waiting)
        if self._dropped:
            self._log_missing()
        self._lines.close()

    def _take(self) -> None:
        self._size -= len(self._waiting.popleft())

    def _log_missing(self) -> None:
        log.error("transcript_lines_missing", lines=self._dropped)
        self._dropped = 0
