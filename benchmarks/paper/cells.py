"""A cell is one run of `selfpruner`. Tables that ask for the same run share it, for its id says what is run."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from benchmarks.holding import writing
from benchmarks.paper.answers import Figures, UnreadableAnswer, What, read
from protocol.runtime.files import replace


class Cell(BaseModel):
    """One run, and those that come before it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: What
    model: str
    """As `selfpruner` is told it."""
    method: str
    rate: float
    """Nought for a model as it is."""
    flags: tuple[str, ...] = ()
    """All that decides the result, but for where files are."""
    config: Path | None = None
    """The settings file of a search."""
    config_digest: str = ""
    """Of what stands in it."""
    needs: tuple["Cell", ...] = ()
    """Runs whose files this one reads."""
    note: str = ""
    """What people are told of it besides; of a cell that tables share, what the first of them says."""
    tokens: float = 0.0
    """Tokens through the dense model that it takes as long as; see costs.py."""
    loads: float = 1.0
    """How often as much as the dense model is loaded."""

    @property
    def id(self) -> str:
        """Names its result, its search and its folder: equal where the same is run, and also a search's name."""
        decides = self.model_dump(mode="json", exclude={"config", "note", "tokens", "loads", "needs"})
        decides["needs"] = [need.id for need in self.needs]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
        model = re.sub(r"[^a-z0-9.]+", "-", Path(self.model).name.lower())[:16]
        return f"{self.what}-{model}-{self.method}-{self.rate:g}-{digest}"

    @property
    def words(self) -> str:
        """For people."""
        rate = f" at {100 * self.rate:g}%" if self.rate else ""
        note = f", {self.note}" if self.note else ""
        return f"{self.what} {self.model}, {self.method}{rate}{note}"


def with_needs(cells: Iterable[Cell]) -> list[Cell]:
    """The cells and those that they need, each once, in an order in which they can run."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found |= {need.id: need for need in with_needs(cell.needs) if need.id not in found}
        found.setdefault(cell.id, cell)
    return list(found.values())


class Measured(BaseModel):
    """A run that ended well."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["measured"] = "measured"
    answer: dict[str, Any]
    """All that it printed."""
    seconds: float
    """Wall time, starting and loading included; of a search over all its restarts."""


class Failed(BaseModel):
    """A run that did not; it is tried again at the next call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["failed"] = "failed"
    sentence: str


Outcome = Measured | Failed
_OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Annotated[Outcome, Field(discriminator="kind")])


class CellStore:
    """The results in OUT/cells, one file each, whole or not there."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "cells"

    def load(self, cell: Cell) -> Outcome | None:
        """Its outcome; None for a cell that never ended, or whose file is not one of ours."""
        try:
            kept = json.loads(self._file(cell).read_text(encoding="utf-8"))
            return _OUTCOME.validate_python(kept["outcome"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def keep(self, cell: Cell, outcome: Outcome) -> None:
        """Write it down, with what was run. Raises UsageError where there is no room for it."""
        record = {"cell": cell.model_dump(mode="json"), "outcome": outcome.model_dump(mode="json")}
        with writing(self._file(cell)):
            self._folder.mkdir(parents=True, exist_ok=True)
            replace(self._file(cell), json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def _file(self, cell: Cell) -> Path:
        return self._folder / f"{cell.id}.json"


def figures_of(cell: Cell, outcome: Outcome | None) -> Figures | str | None:
    """Its figures, or the sentence why there are none; None for a cell that has not been run."""
    if outcome is None:
        return None
    if isinstance(outcome, Failed):
        return outcome.sentence
    try:
        return read(cell.what, outcome.answer)
    except UnreadableAnswer as error:
        return str(error)
