"""The charts of a search: its progress, the best rates beside what the model itself says, and the best candidates."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from daemon.monitor.drawing import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    RED,
    SHADES,
    Canvas,
    Drawing,
    Scale,
    shade,
)
from daemon.monitor.front import Front, minimised
from daemon.monitor.record import SearchRecord
from daemon.monitor.summary import Row, columns_of
from protocol.plans.allocation import uniform_label
from protocol.plans.candidate import SOURCE_NAMES, Measured, Source
from protocol.plans.shape import Unit
from protocol.plans.spec import MEASURE_NAMES

WIDTH = 760
LEFT = 62
SOURCE_COLOURS: dict[Source, str] = {"llm": BLUE, "classical": ORANGE, "fallback": GREY, "allocation": GREEN}
MEMBERS_SHOWN = 40
"""Candidates in the chart of the population, best first."""
LABEL_HEIGHT = 14.0
Curve = list[tuple[int, float]]
"""Number of evaluations and the best value after them, at each improvement."""


def draw_progress(*records: SearchRecord) -> Drawing:
    """Draw the best candidate so far against the number of evaluations.

    If uniform pruning is measured in all searches, values are divided by its value, so that below 1 a search has gained
    something. One search is drawn with all its candidates, several with their best values only.
    """
    is_relative = all(record.uniform for record in records)
    curves = [_best_so_far(record, is_relative=is_relative) for record in records]
    only = records[0] if len(records) == 1 else None
    dots = _measured(only, is_relative=is_relative) if only else []
    rows = _lines(only, is_relative=is_relative) if only else {"uniform": 1.0} if is_relative else {}
    values = sorted(value for curve in curves for _, value in curve) + list(rows.values())
    measures = {record.spec.measure for record in records}
    measure = MEASURE_NAMES[records[0].spec.measure] if len(measures) == 1 else "what each search minimises"
    label = f"{measure} ÷ {uniform_label(records[0].spec.reconstruction)}" if is_relative else measure
    ends = [f"{record.search}: {curve[-1][1]:.4g}" for record, curve in zip(records, curves, strict=True) if curve]
    canvas = Canvas(WIDTH, 360, f"Progress of {', '.join(r.search for r in records)}", f"{label}. " + "; ".join(ends))
    if not values:
        canvas.text(LEFT, 60, "no candidate has been measured yet")
        return canvas.drawing()
    # Candidates far worse than uniform pruning are drawn at the upper border.
    room = (max(values) - min(values)) * 0.15 or 0.05 * max(values)
    top = max(values) + (room if len(dots) < 2 else max(room, _quantile([v for _, v, _ in dots], 0.8) - max(values)))
    y = Scale(min(values) - room, top, 300, 24)
    x = Scale(0, max([number for number, _, _ in dots] + [len(r.proposals) for r in records]), LEFT, WIDTH - 165)
    _draw_axes(canvas, x, y, "evaluations", label)
    for source, colour in SOURCE_COLOURS.items():
        canvas.dots(((x(number), y(value)) for number, value, made_by in dots if made_by == source), colour)
    for value in rows.values():
        canvas.line(x(x.low), y(value), x(x.high), y(value), INK, dashes="5 4")
    labels = [(y(value), f"{name} {value:.4g}", INK) for name, value in rows.items()]
    for i, (record, curve) in enumerate(zip(records, curves, strict=True)):
        if curve:
            points = [(x(number), y(value)) for number, value in curve]
            colour = RED if only else COLOURS[i % len(COLOURS)]
            canvas.steps([*points, (x(len(record.proposals)), points[-1][1])], colour)
            labels.append((points[-1][1], f"{'best' if only else record.search} {curve[-1][1]:.4g}", colour))
    for height, said, colour in _apart(labels):
        canvas.text(WIDTH - 158, height + 4, said[:26], colour=colour)
    shown = [source for source in SOURCE_COLOURS if any(made_by == source for _, _, made_by in dots)]
    for i, source in enumerate(shown):
        canvas.dots([(LEFT + 6 + i * 150, 350)], SOURCE_COLOURS[source])
        canvas.text(LEFT + 16 + i * 150, 354, SOURCE_NAMES[source])
    return canvas.drawing()


def draw_rates(record: SearchRecord) -> Drawing:
    """Draw the best candidate's rates over the depth of the model, above how sensitive each unit is to pruning."""
    best, spec = record.population.best(), record.spec
    units = record.profile.shape.units(spec.granularity)
    kinds = list(dict.fromkeys(unit.kind for unit in units))
    canvas = Canvas(
        WIDTH, 20 + 250 * len(kinds), f"Rates of {record.search}",
        "Bars upwards: the pruning rate of each unit in the best candidate. Bars downwards: its sensitivity, the "
        "divergence when only this unit is pruned.",
    )  # fmt: skip
    if best is None:
        canvas.text(LEFT, 60, "no candidate has been measured yet")
        return canvas.drawing()
    rates, sensitivity = best.candidate.rates, record.profile.sensitivity
    highest = max(*rates, spec.rate)  # the same for all panels, so that they can be compared
    for i, kind in enumerate(kinds):
        chosen = [(unit, j) for j, unit in enumerate(units) if unit.kind == kind]
        _draw_panel(canvas, 14 + 250 * i, kind, chosen, rates, sensitivity, spec.rate, highest)
    return canvas.drawing()


def draw_population(record: SearchRecord) -> Drawing:
    """Draw the rates of the best candidates as a map: a row for each, best on top, a column for each unit."""
    members = record.population.top(MEMBERS_SHOWN)
    units = record.profile.shape.units(record.spec.granularity)
    order = sorted(range(len(units)), key=lambda i: (units[i].kind, units[i].layer))  # attention, then MLP
    row, top = 11.0, 40.0
    canvas = Canvas(
        WIDTH, top + row * max(1, len(members)) + 46, f"Population of {record.search}",
        f"Pruning rates of the {len(members)} best candidates, best on top; a column for each unit, by depth.",
    )  # fmt: skip
    if not members:
        canvas.text(LEFT, 60, "no candidate has been measured yet")
        return canvas.drawing()
    # A few high rates must not make all others look alike: they have the colour of the highest but a fiftieth.
    highest = _quantile([rate for member in members for rate in member.candidate.rates], 0.98) or 1.0
    kinds = sorted({unit.kind for unit in units})
    gap = 12.0
    width = (WIDTH - LEFT - 110 - gap * (len(kinds) - 1)) / len(units)
    places: dict[int, float] = {}
    for place, i in enumerate(order):
        places[i] = LEFT + place * width + gap * kinds.index(units[i].kind)
    for kind in kinds:
        first = next(i for i in order if units[i].kind == kind)
        canvas.text(places[first], top - 8, f"{'MLP' if kind == 'mlp' else kind}, by depth")
    cells: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for rank, member in enumerate(members):
        height = top + rank * row
        for i, rate in enumerate(member.candidate.rates):
            cells[shade(min(1.0, rate / highest))].append((places[i], height))
        assert isinstance(member.outcome, Measured), "members are measured"
        if rank % 5 == 0:
            canvas.text(LEFT - 6, height + row - 2, f"{rank + 1}", anchor="end", size=10)
            canvas.text(WIDTH - 104, height + row - 2, f"{member.outcome.fitness:.4g}", size=10)
    for colour, corners in cells.items():
        canvas.cells(corners, width + 0.1, row - 1, colour)
    canvas.text(WIDTH - 104, top - 8, record.spec.measure, size=10)
    below = top + row * len(members) + 14
    for i in range(SHADES):
        canvas.bar(LEFT + i * 3.6, below, 3.7, 10, shade(i / (SHADES - 1)))
    canvas.text(LEFT - 6, below + 9, "0 %", anchor="end", size=10)
    canvas.text(LEFT + 156, below + 9, f"{highest:.0%} removed, or more", size=10)
    return canvas.drawing()


def draw_front(front: Front) -> Drawing:
    """Draw the best candidate of each rate, and uniform pruning, against the number of parameters that stay."""
    of = minimised(front.fitness)
    uniform = uniform_label(front.reconstruction)
    curves: dict[str, list[Row | None]] = {
        "best": [point.best for point in front.points],
        uniform: [point.uniform for point in front.points],
    }
    found = {
        name: [(row.parameters.total_after / 1e6, value) for row in rows if row and (value := of(row)) is not None]
        for name, rows in curves.items()
    }
    label = MEASURE_NAMES[front.fitness]
    said = "; ".join(f"{name}: {x:.1f} M {y:.4g}" for name, points in found.items() for x, y in points)
    canvas = Canvas(WIDTH, 360, f"{front.model} at several rates", f"{label} against millions of parameters. {said}")
    every = [point for points in found.values() for point in points]
    if not every:
        canvas.text(LEFT, 60, "no candidate has been measured yet")
        return canvas.drawing()
    dense = of(front.dense)
    size = front.dense.parameters.total_before / 1e6
    every += [(size, dense)] if dense is not None else []
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x = Scale(min(xs) - 0.05 * (max(xs) - min(xs)), max(xs), LEFT, WIDTH - 165)
    y = Scale(min(ys), max(ys) * 1.05, 300, 24)
    _draw_axes(canvas, x, y, "millions of parameters", label)
    for number, ((name, points), colour) in enumerate(zip(found.items(), (RED, BLUE), strict=True)):
        line = sorted([*points, *([(size, dense)] if dense is not None else [])])
        for (x1, y1), (x2, y2) in pairwise(line):
            canvas.line(x(x1), y(y1), x(x2), y(y2), colour)
        canvas.dots([(x(across), y(up)) for across, up in points], colour)
        canvas.dots([(WIDTH - 150, 40 + 20 * number)], colour)
        canvas.text(WIDTH - 140, 44 + 20 * number, name[:24], colour=colour)
    for point in front.points:
        if point.best is not None and (value := of(point.best)) is not None:
            across = x(point.best.parameters.total_after / 1e6)
            canvas.text(across - 8, y(value) + 12, f"−{100 * point.rate:g} %", anchor="end", size=10)
    return canvas.drawing()


def _draw_panel(
    canvas: Canvas,
    top: float,
    kind: str,
    units: Sequence[tuple[Unit, int]],
    rates: Sequence[float],
    sensitivity: Sequence[float],
    target: float,
    highest: float,
) -> None:
    """Draw the rates and the sensitivities of the units of one kind, given with their numbers."""
    zero, right = top + 140, WIDTH - 90.0
    up = Scale(0, highest * 1.05, zero, top + 14)
    step = (right - LEFT) / len(units)
    for tick in up.ticks(4):
        canvas.line(LEFT, up(tick), right, up(tick), PALE)
        canvas.text(LEFT - 6, up(tick) + 4, f"{tick:.0%}", anchor="end")
    canvas.text(LEFT, top + 6, f"{'MLP' if kind == 'mlp' else kind}: rate of the best candidate")
    down = Scale(0, max(sensitivity, default=0.0) or 1.0, zero, zero + 66)
    for place, (unit, i) in enumerate(units):
        at = LEFT + place * step + step * 0.12
        about = f"{unit.name}: {rates[i]:.1%} removed"
        canvas.bar(at, up(rates[i]), step * 0.76, zero - up(rates[i]), BLUE, about)
        if sensitivity:
            said = f"{unit.name}: sensitivity {sensitivity[i]:.4g}"
            canvas.bar(at, zero + 1, step * 0.76, down(sensitivity[i]) - zero, RED, said)
        if unit.layer % (5 if len(units) > 12 else 1) == 0:
            canvas.text(at + step * 0.38, zero + 84, str(unit.layer), anchor="middle")
    canvas.line(LEFT, up(target), right, up(target), INK, dashes="5 4")
    canvas.text(right + 6, up(target) + 4, f"target {target:.0%}")
    canvas.line(LEFT, zero, right, zero)
    if sensitivity:
        canvas.text(right + 6, zero + 24, "sensitivity", colour=RED)
    canvas.text((LEFT + right) / 2, zero + 102, "layer", anchor="middle")


def _draw_axes(canvas: Canvas, x: Scale, y: Scale, across: str, up: str) -> None:
    for tick in y.ticks(6):
        canvas.line(x(x.low), y(tick), x(x.high), y(tick), PALE)
        canvas.text(LEFT - 6, y(tick) + 4, f"{tick:g}", anchor="end")
    for tick in x.ticks(6):
        if tick == round(tick):
            canvas.text(x(tick), y(y.low) + 18, f"{tick:g}", anchor="middle")
    canvas.line(x(x.low), y(y.low), x(x.high), y(y.low))
    canvas.text((x(x.low) + x(x.high)) / 2, y(y.low) + 34, across, anchor="middle")
    canvas.text(6, 14, up)


def _measured(record: SearchRecord, *, is_relative: bool) -> list[tuple[int, float, Source]]:
    """Return the number, the value and the source of each measured candidate."""
    unit = record.uniform.fitness if is_relative and record.uniform else 1.0
    return [
        (number, each.outcome.fitness / unit, each.candidate.provenance.source)
        for number, each in enumerate(record.proposals, 1)
        if isinstance(each.outcome, Measured)
    ]


def _best_so_far(record: SearchRecord, *, is_relative: bool) -> Curve:
    curve: Curve = []
    for number, value, _ in _measured(record, is_relative=is_relative):
        if not curve or value < curve[-1][1]:
            curve.append((number, value))
    return curve


def _lines(record: SearchRecord, *, is_relative: bool) -> dict[str, float]:
    """Return the values that a search is compared with.

    The dense model is not among them: it is so much better that all candidates would look alike.
    """
    summary = record.summary
    of = columns_of(summary)[0].of
    uniform = of(summary.uniform)
    unit = uniform if is_relative and uniform else 1.0
    rows = {"uniform": uniform}
    if summary.best_allocation is not None:
        rows["best allocation"] = of(summary.best_allocation)
    return {name: value / unit for name, value in rows.items() if value is not None}


def _apart(labels: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Return the labels moved down where they would overlap."""
    placed: list[tuple[float, str, str]] = []
    for height, said, colour in sorted(labels):
        lowest = placed[-1][0] + LABEL_HEIGHT if placed else height
        placed.append((max(height, lowest), said, colour))
    return placed


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]
