"""Layouts of tables, and finished tables filled with the outcomes of their cells. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.paper.answers import Figures
from benchmarks.paper.cells import Cell, Outcome, figures_of

FigureGetter = Callable[[Figures], float | None]


@dataclass(frozen=True)
class EntryLayout:
    """An entry of a table: the cell that provides our figure, if any, and the paper's figure."""

    cell: Cell | None
    get_figure: FigureGetter
    paper: float | None = None
    alternatives: tuple[Cell, ...] = ()
    """Further cells with the same figure, tried in order if the first has none."""

    def source(self, outcomes: Mapping[str, Outcome]) -> Cell | None:
        """Return the first of its cells that has figures, or its first cell if none has."""
        cells = [cell for cell in (self.cell, *self.alternatives) if cell is not None]
        return next((cell for cell in cells if isinstance(_figures(cell, outcomes), Figures)), self.cell)


RowLayout = tuple[tuple[str, ...], tuple[EntryLayout, ...]]
"""The labels of a row, and its entries."""


@dataclass(frozen=True)
class TableLayout:
    """A table before its cells are run. `digits` are the decimals of each column."""

    number: int
    title: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    digits: tuple[int, ...]
    rows: tuple[RowLayout, ...]

    @property
    def cells(self) -> list[Cell]:
        """The cells of all entries."""
        return [entry.cell for _, row in self.rows for entry in row if entry.cell is not None]


@dataclass(frozen=True)
class Entry:
    """An entry of a finished table. With neither a figure nor a failure, its cell was not run or does not exist."""

    ours: float | None = None
    paper: float | None = None
    failed: str | None = None
    """Why there is no figure."""


@dataclass(frozen=True)
class Row:
    """A row of a finished table."""

    labels: tuple[str, ...]
    entries: tuple[Entry, ...]


def fill_table(table: TableLayout, outcomes: Mapping[str, Outcome]) -> list[Row]:
    """Return the rows of a table, filled with the outcomes of cells by id."""
    return [Row(labels, tuple(_fill_entry(entry, outcomes) for entry in row)) for labels, row in table.rows]


def _fill_entry(entry: EntryLayout, outcomes: Mapping[str, Outcome]) -> Entry:
    cell = entry.source(outcomes)
    if cell is None:
        return Entry(paper=entry.paper)
    found = _figures(cell, outcomes)
    if isinstance(found, Figures):
        return Entry(entry.get_figure(found), entry.paper)
    return Entry(paper=entry.paper, failed=found)


def _figures(cell: Cell, outcomes: Mapping[str, Outcome]) -> Figures | str | None:
    return figures_of(cell, outcomes.get(cell.id))
