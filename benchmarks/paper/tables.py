"""Tables, and what they become of cells' outcomes. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.paper.answers import Figures
from benchmarks.paper.cells import Cell, Outcome, figures_of

Pick = Callable[[Figures], float | None]


@dataclass(frozen=True)
class Wanted:
    """A place of a table: the cell whose figure goes there, and the paper's. No cell: nothing is asked."""

    cell: Cell | None
    pick: Pick
    paper: float | None = None
    else_of: tuple[Cell, ...] = ()
    """Cells that know the same figure, in order, for where the first has none."""

    def source(self, outcomes: Mapping[str, Outcome]) -> Cell | None:
        """The first of its cells that has figures; the first of all where none has."""
        cells = [cell for cell in (self.cell, *self.else_of) if cell is not None]
        return next((cell for cell in cells if isinstance(_figures(cell, outcomes), Figures)), self.cell)


WantedRow = tuple[tuple[str, ...], tuple[Wanted, ...]]
"""The labels of a row, and its places."""


@dataclass(frozen=True)
class WantedTable:
    """A table before its cells are run. `digits` are those of each column."""

    number: int
    title: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    digits: tuple[int, ...]
    rows: tuple[WantedRow, ...]

    @property
    def cells(self) -> list[Cell]:
        """All cells that it asks for."""
        return [wanted.cell for _, row in self.rows for wanted in row if wanted.cell is not None]


@dataclass(frozen=True)
class Entry:
    """A place of a finished table. Neither a figure nor a failure: it was not run, or is not asked for."""

    ours: float | None = None
    paper: float | None = None
    failed: str | None = None
    """Why there is no figure."""


@dataclass(frozen=True)
class Row:
    """A row of a finished table."""

    labels: tuple[str, ...]
    entries: tuple[Entry, ...]


def filled(table: WantedTable, outcomes: Mapping[str, Outcome]) -> list[Row]:
    """The rows of a table, from the outcomes of cells by their ids."""
    return [Row(labels, tuple(_entry(wanted, outcomes) for wanted in row)) for labels, row in table.rows]


def _entry(wanted: Wanted, outcomes: Mapping[str, Outcome]) -> Entry:
    cell = wanted.source(outcomes)
    if cell is None:
        return Entry(paper=wanted.paper)
    found = _figures(cell, outcomes)
    if isinstance(found, Figures):
        return Entry(wanted.pick(found), wanted.paper)
    return Entry(paper=wanted.paper, failed=found)


def _figures(cell: Cell, outcomes: Mapping[str, Outcome]) -> Figures | str | None:
    return figures_of(cell, outcomes.get(cell.id))
