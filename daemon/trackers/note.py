"""The file run.json in a tracker's folder: which of the tracker's runs belongs to the search."""

from pathlib import Path

from pydantic import ValidationError

from protocol.plans.value import Value
from protocol.runtime.files import write_atomically

FILE = "run.json"


class Note(Value):
    """The id that the tracker knows the run by, and the last step sent, for trackers that cannot report it."""

    id: str
    last_step: int = 0

    @classmethod
    def read(cls, folder: Path) -> "Note | None":
        """Return the note in a tracker's folder; None if there is none, or if it is damaged."""
        try:
            return cls.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, ValidationError):
            return None

    def write(self, folder: Path) -> None:
        """Replace the note. Raises OSError."""
        write_atomically(folder / FILE, self.model_dump_json(), durable=False)
