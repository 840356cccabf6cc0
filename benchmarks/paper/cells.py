"""Cells: single runs of `selfpruner`. A cell's id is a hash of the run, so tables that need the same run share it."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from benchmarks.output_folder import reporting_write_errors
from benchmarks.paper.answers import CellCommand, Figures, UnreadableAnswer, read
from protocol.plans.value import Value
from protocol.runtime.files import write_atomically


class Cell(Value):
    """One run of `selfpruner`, and the runs that it depends on."""

    what: CellCommand
    model: str
    """The model as given to `selfpruner`."""
    method: str
    rate: float
    """The pruning rate; 0 for the dense model."""
    flags: tuple[str, ...] = ()
    """All flags that affect the result; paths of files are not among them."""
    config: Path | None = None
    """The settings file of a search."""
    config_digest: str = ""
    """Digest of the settings file's content."""
    needs: tuple["Cell", ...] = ()
    """Runs whose files this run reads."""
    note: str = ""
    """Further information for the reader. If tables share a cell, it has the note of the first table."""
    tokens: float = 0.0
    """Cost, as the number of tokens that the dense model reads in the same time; see costs.py."""
    loads: float = 1.0
    """Amount of loaded weights, as a multiple of the dense model's weights."""

    @property
    def id(self) -> str:
        """The name of the run's result, search and folder. Equal runs have equal ids, which are valid search names."""
        decides = self.model_dump(mode="json", exclude={"config", "note", "tokens", "loads", "needs"})
        decides["needs"] = [need.id for need in self.needs]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
        model = re.sub(r"[^a-z0-9.]+", "-", Path(self.model).name.lower())[:16]
        return f"{self.what}-{model}-{self.method}-{self.rate:g}-{digest}"

    @property
    def description(self) -> str:
        """A short description for messages and tables."""
        rate = f" at {100 * self.rate:g}%" if self.rate else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.what} {self.model}, {self.method}{rate}{note}"


def with_needs(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells and the cells that they need, each once, in an order in which they can run."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found |= {need.id: need for need in with_needs(cell.needs) if need.id not in found}
        found.setdefault(cell.id, cell)
    return list(found.values())


class Measured(Value):
    """A successful run."""

    kind: Literal["measured"] = "measured"
    answer: dict[str, Any]
    """The JSON that the run printed."""
    seconds: float
    """Wall time, including start and loading; for a search, over all its restarts."""


class Failed(Value):
    """A failed run, which is retried at the next call."""

    kind: Literal["failed"] = "failed"
    sentence: str


Outcome = Measured | Failed
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Annotated[Outcome, Field(discriminator="kind")])


class CellStore:
    """The results in OUT/cells, one file each, written atomically."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "cells"

    def load(self, cell: Cell) -> Outcome | None:
        """Return the cell's outcome; None if it never finished, or its file is not readable."""
        try:
            kept = json.loads(self._file(cell).read_text(encoding="utf-8"))
            return _OUTCOME.validate_python(kept["outcome"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def keep(self, cell: Cell, outcome: Outcome) -> None:
        """Write the outcome and its cell to a file. Raises UsageError if that fails."""
        record = {"cell": cell.model_dump(mode="json"), "outcome": outcome.model_dump(mode="json")}
        with reporting_write_errors(self._file(cell)):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(cell), json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def _file(self, cell: Cell) -> Path:
        return self._folder / f"{cell.id}.json"


def figures_of(cell: Cell, outcome: Outcome | None) -> Figures | str | None:
    """Return the cell's figures, or a sentence that explains why it has none; None if it was not run."""
    if outcome is None:
        return None
    if isinstance(outcome, Failed):
        return outcome.sentence
    try:
        return read(cell.what, outcome.answer)
    except UnreadableAnswer as error:
        return str(error)
