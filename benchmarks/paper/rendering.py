"""Finished tables as Markdown, as JSON, and as the list of what --estimate expects."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.answers import Figures
from benchmarks.paper.cells import Cell, Measured, Outcome, figures_of
from benchmarks.paper.costs import CostModel
from benchmarks.paper.running import in_words, missing
from benchmarks.paper.tables import Entry, Row, WantedTable, filled

INTRODUCTION = (
    "Ours, and in square brackets the paper's of the same model. –: not measured. Figures of a search are of one "
    "search with one seed; compare them with Wanda-sp that is fitted (least-squares). Where query heads share KV "
    "heads, Wanda-sp keeps as many of each, a weak baseline, and Wanda-sp with any heads is masked, for no format can "
    "hold it."
)


def markdown(tables: Sequence[WantedTable], outcomes: Mapping[str, Outcome], about: str) -> str:
    """All tables, after a sentence `about` them; under each, why cells have failed."""
    parts = ["# The paper's tables", f"{INTRODUCTION} {about}"]
    for table in tables:
        parts += [f"## Table {table.number}: {table.title}", _table(table, filled(table, outcomes))]
        if how := _measured_by(table, outcomes):
            parts.append(f"Measured by {'; '.join(how)}.")
        if by_task := _tasks(table, outcomes):
            parts += ["By task, percent:", by_task]
    return "\n\n".join(parts) + "\n"


def as_json(tables: Sequence[WantedTable], outcomes: Mapping[str, Outcome], about: str) -> dict[str, Any]:
    """The same; each place with `ours`, `paper`, `failed` and the `cell` that it comes from."""
    return {"about": about, "tables": [_table_json(table, outcomes) for table in tables]}


def expected(
    tables: Sequence[WantedTable], outcomes: Mapping[str, Outcome], out: Path, cost: CostModel
) -> tuple[list[list[str]], str]:
    """Of all cells that are missing: id, what it is, hours and what these rest on; and the sum in a sentence."""
    cells = missing([cell for table in tables for cell in table.cells], outcomes, out)
    seconds = [cost.seconds(cell) for cell in cells]
    rows = [
        [cell.id, cell.words, "unknown" if each is None else f"{each / 3600:,.2f}", cost.basis(cell)]
        for cell, each in zip(cells, seconds, strict=True)
    ]
    known = [each for each in seconds if each is not None]
    unknown = len(seconds) - len(known)
    rest = f", and {unknown} of models of unknown size: give `billions` of these" if unknown else ""
    return rows, f"{len(cells)} cells are missing: {in_words(sum(known))}{rest}"


def _table(table: WantedTable, rows: Sequence[Row]) -> str:
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


def _measured_by(table: WantedTable, outcomes: Mapping[str, Outcome]) -> list[str]:
    """Engine, device and type of the weights of Table 7's figures: usually one for all."""
    found = (figures_of(cell, outcomes.get(cell.id)) for cell in table.cells if cell.what == "speed")
    return list(dict.fromkeys(each.speed.how for each in found if isinstance(each, Figures) and each.speed))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _tasks(table: WantedTable, outcomes: Mapping[str, Outcome]) -> str | None:
    """The accuracies of Table 2 task by task, as the paper's Tables 8 to 11."""
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


def _table_json(table: WantedTable, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    rows = []
    for row, (_, wanted) in zip(filled(table, outcomes), table.rows, strict=True):
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
