"""Records what a call of `selfpruner prune` must write and has written, so that a killed command can resume."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from protocol.errors import SelfPrunerError
from protocol.plans.allocation import PruningRequest
from protocol.plans.spec import SearchSpec
from protocol.results.commands import ExportResult, FinetuneResult
from protocol.results.finetuning import Recipe
from protocol.results.formats import FACTS, Destination
from protocol.runtime.files import write_atomically

BEGUN, WRITTEN = "begun.json", "written.json"
"""Files in the search's folder: the flags of the last call that began to write, and the record of its output."""


@dataclass(frozen=True)
class Tuning:
    """Data, recipe and time limit for fine-tuning the pruned model."""

    data: str
    recipe: Recipe
    minutes: float | None = None
    """Maximum training time in minutes."""


@dataclass(frozen=True)
class Goal:
    """The output that the command must produce."""

    search: str
    """Name of the search."""
    search_folder: Path
    spec: SearchSpec
    destination: Destination
    tuning: Tuning | None = None

    @property
    def out(self) -> Path:
        """Return the folder to create."""
        return self.destination.folder

    @property
    def pruned(self) -> Path:
        """Return the folder of the model before fine-tuning."""
        return self.search_folder / "pruned"

    @property
    def flags(self) -> dict[str, Any]:
        """Return the settings that determine the folder's content besides the search, as JSON."""
        tuning = None
        if self.tuning is not None:
            tuning = vars(self.tuning) | {"recipe": self.tuning.recipe.model_dump(mode="json")}
        destination = self.destination
        formats = list(destination.formats)
        return {"out": str(self.out.absolute()), "formats": formats, "type": destination.gguf_type, "tuning": tuning}


class Written(BaseModel):
    """Record of the goal's folder, so that a command that was killed during its checks resumes with the checks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flags: dict[str, Any]
    """The flags of the call that wrote the folder."""
    facts: str
    """SHA-256 of the folder's selfpruner.json, which tells whether another search has replaced the folder."""
    exported: ExportResult
    finetuned: FinetuneResult | None
    is_checked: bool = False
    """Whether the final checks have ended, passed or not. After that, --force starts over."""

    @property
    def perplexity(self) -> float | None:
        """Return the perplexity in memory before the model was written."""
        if self.finetuned is None:
            return self.exported.perplexity
        measured = self.finetuned.finetuning.perplexity
        return None if measured is None else measured.after


def written_before(goal: Goal) -> Written | None:
    """Return the record of an earlier call with the same flags; None if there is nothing to reuse.

    --force replaces a folder that was checked. A command that was killed before its checks ended resumes even with
    --force, so that nothing is trained twice.
    """
    found = _recorded(goal)
    if found is None or (goal.destination.force and found.is_checked):
        return None
    return found if found.flags == goal.flags else None


def was_written_unrecorded(goal: Goal) -> bool:
    """Return whether a call with the same flags wrote the goal's folder but was killed before recording it."""
    try:
        flags = json.loads((goal.search_folder / BEGUN).read_bytes())
        facts = json.loads((goal.out / FACTS).read_bytes())
        rates = json.loads((goal.search_folder / "best.json").read_bytes())["rates"]
        tunings = [(each["recipe"], each["data"]) for each in facts["finetunings"]]
        found = (facts["method"], facts["rates"], facts["formats"], tunings)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    tuning = goal.tuning
    tuned = [] if tuning is None else [(tuning.recipe.model_dump(mode="json"), Path(tuning.data).name)]
    of_search = (f"search {goal.search}", rates, list(goal.destination.formats), tuned)
    return bool(flags == goal.flags and found == of_search and _recorded(goal) is None)


def holds(folder: Path, request: PruningRequest) -> bool:
    """Return whether an exported folder was pruned with the rates of `request`."""
    try:
        return bool(json.loads((folder / FACTS).read_bytes())["rates"] == list(request.choice))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def begin(goal: Goal) -> None:
    """Record that the goal's folder is about to be written. Raises SelfPrunerError."""
    keep(goal.search_folder / BEGUN, json.dumps(goal.flags))


def record(goal: Goal, exported: ExportResult, finetuned: FinetuneResult | None) -> Written:
    """Record what was written to the goal's folder. Raises SelfPrunerError."""
    written = Written(flags=goal.flags, facts=_digest(goal), exported=exported, finetuned=finetuned)
    keep(goal.search_folder / WRITTEN, written.model_dump_json())
    return written


def record_checked(goal: Goal, written: Written) -> None:
    """Record that the final checks of the folder have ended. Raises SelfPrunerError."""
    keep(goal.search_folder / WRITTEN, written.model_copy(update={"is_checked": True}).model_dump_json())


def keep(file: Path, text: str) -> None:
    """Write a file for the next call to read. Raises SelfPrunerError."""
    try:
        write_atomically(file, text + "\n")
    except OSError as error:
        raise SelfPrunerError(
            f"{file} cannot be written ({error.strerror}); fix that and run the same command again"
        ) from error


def _recorded(goal: Goal) -> Written | None:
    """Return the record of the goal's folder; None if there is no record, or the folder has been replaced."""
    try:
        found = Written.model_validate_json((goal.search_folder / WRITTEN).read_bytes())
        return found if found.facts == _digest(goal) else None
    except (OSError, ValidationError):
        return None


def _digest(goal: Goal) -> str:
    return hashlib.sha256((goal.out / FACTS).read_bytes()).hexdigest()
