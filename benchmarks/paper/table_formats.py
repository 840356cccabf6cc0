"""Finished tables as Markdown and JSON, and the list of missing cells for --estimate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.answers import Figures
from benchmarks.paper.cells import Cell, Measured, Outcome, figures_of
from benchmarks.paper.costs import CostModel
from benchmarks.paper.runner import duration_text, missing
from benchmarks.paper.tables import Entry, Row, TableLayout, fill_table

INTRODUCTION = (
    "Our figures, with the paper's figures for the same model in square brackets; – means not measured. Figures of "
    "Self-Pruner come from one search with one seed; compare them with Wanda-sp with least-squares reconstruction. On "
    "models with grouped-query attention, Wanda-sp keeps the same number of query heads per KV head, a weak baseline. "
    "Wanda-sp (any heads) is measured with masks, for no model format can store it."
)


def tables_markdown(tables: Sequence[TableLayout], outcomes: Mapping[str, Outcome], about: str) -> str:
    """Return all tables as Markdown, after the sentence `about`. The reasons of failed cells are below each table."""
    parts = ["# The paper's tables", f"{INTRODUCTION} {about}"]
    for table in tables:
        parts += [f"## Table {table.number}: {table.title}", _table(table, fill_table(table, outcomes))]
        if how := _measured_by(table, outcomes):
            parts.append(f"Measured by {'; '.join(how)}.")
        if by_task := _tasks(table, outcomes):
            parts += ["By task, percent:", by_task]
    return "\n\n".join(parts) + "\n"


def tables_json(tables: Sequence[TableLayout], outcomes: Mapping[str, Outcome], about: str) -> dict[str, Any]:
    """Return all tables as JSON; each entry has `ours`, `paper`, `failed` and the id of its `cell`."""
    return {"about": about, "tables": [_table_json(table, outcomes) for table in tables]}


def estimate_rows(
    tables: Sequence[TableLayout], outcomes: Mapping[str, Outcome], out: Path, cost: CostModel
) -> tuple[list[list[str]], str]:
    """Return id, description, hours and basis of each missing cell, and a sentence with the total."""
    cells = missing([cell for table in tables for cell in table.cells], outcomes, out)
    seconds = [cost.seconds(cell) for cell in cells]
    rows = [
        [cell.id, cell.description, "unknown" if each is None else f"{each / 3600:,.2f}", cost.basis(cell)]
        for cell, each in zip(cells, seconds, strict=True)
    ]
    known = [each for each in seconds if each is not None]
    unknown = len(seconds) - len(known)
    rest = f", without {unknown} cells of models of unknown size: set `billions` for these models" if unknown else ""
    return rows, f"{len(cells)} cells are missing: {duration_text(sum(known))}{rest}"


def _table(table: TableLayout, rows: Sequence[Row]) -> str:
    sentences: dict[str, int] = {}
    lines = [
        _line([*table.heads, *table.columns]),
        _line(["---"] * len(table.heads) + ["---:"] * len(table.columns)),
    ]
    for row in rows:
        entries = zip(row.entries, table.digits, strict=True)
        lines.append(_line([*row.labels, *(_said(entry, digits, sentences) for entry, digits in entries)]))
    if sentences:
        lines.append("")
        lines += [f"{number}. {sentence}" for sentence, number in sentences.items()]
    return "\n".join(lines)


def _said(entry: Entry, digits: int, sentences: dict[str, int]) -> str:
    if entry.failed is not None:
        ours = f"failed ({sentences.setdefault(entry.failed, len(sentences) + 1)})"
    else:
        ours = "–" if entry.ours is None else f"{entry.ours:,.{digits}f}"
    return ours if entry.paper is None else f"{ours} [{entry.paper:,.{digits}f}]"


def _measured_by(table: TableLayout, outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return engine, device and weight type of Table 7's figures, each combination once."""
    found = (figures_of(cell, outcomes.get(cell.id)) for cell in table.cells if cell.what == "speed")
    return list(dict.fromkeys(each.speed.how for each in found if isinstance(each, Figures) and each.speed))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _tasks(table: TableLayout, outcomes: Mapping[str, Outcome]) -> str | None:
    """Return the accuracies of Table 2 by task, like the paper's Tables 8 to 11; None without any."""
    if table.number != 2:
        return None
    found: list[tuple[list[str], Mapping[str, float]]] = []
    for labels, wanted in table.rows:
        for column, place in zip(table.columns, wanted, strict=True):
            figures = figures_of(place.cell, outcomes.get(place.cell.id)) if place.cell else None
            if isinstance(figures, Figures) and figures.tasks:
                found.append(([column, *labels], figures.tasks))
    names = list(dict.fromkeys(name for _, tasks in found for name in tasks))
    if not found:
        return None
    lines = [_line(["Model", *table.heads, *names]), _line(["---"] * 3 + ["---:"] * len(names))]
    for labels_of_row, tasks in found:
        figures_of_row = (f"{tasks[name]:.2f}" if name in tasks else "–" for name in names)
        lines.append(_line([*labels_of_row, *figures_of_row]))
    return "\n".join(lines)


def _table_json(table: TableLayout, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    rows = []
    for row, (_, wanted) in zip(fill_table(table, outcomes), table.rows, strict=True):
        entries = [
            _entry_json(entry, place.source(outcomes), outcomes)
            for entry, place in zip(row.entries, wanted, strict=True)
        ]
        rows.append({"labels": row.labels, "entries": entries})
    return {
        "table": table.number,
        "title": table.title,
        "heads": table.heads,
        "columns": table.columns,
        "measured_by": _measured_by(table, outcomes),
        "rows": rows,
    }


def _entry_json(entry: Entry, cell: Cell | None, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    outcome = outcomes.get(cell.id) if cell else None
    return {
        "ours": entry.ours,
        "paper": entry.paper,
        "failed": entry.failed,
        "cell": cell and cell.id,
        "seconds": outcome.seconds if isinstance(outcome, Measured) else None,
    }
