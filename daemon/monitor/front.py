"""The front: the best candidate at each of several rates, as a JSON object, a table and a drawing."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from daemon.monitor.summary import WEAK_BASELINE, Row, Summary, number
from protocol.plans.allocation import uniform_label
from protocol.plans.spec import Dtype, Measure, Reconstruction
from protocol.plans.value import Value

FRONT, FRONT_CHART = "front.json", "front.svg"
"""The files of a front in the folder of its name."""


class FrontPoint(Value):
    """The search at one rate."""

    rate: float
    search: str
    """Its name, such as for `selfpruner export --search`."""
    finished: bool
    evaluations: int
    seconds: float
    weight_bytes: int
    """Memory that the pruned model's weights take in the data type of the search."""
    best: Row | None
    uniform: Row
    ratio: float | None
    """The minimised figure of the best candidate divided by that of uniform pruning."""


class Front(Value):
    """The result of searches at several rates."""

    name: str
    model: str
    fitness: Measure
    reconstruction: Reconstruction
    dense: Row
    points: tuple[FrontPoint, ...]
    finished: bool
    """Whether the searches of all rates have ended by themselves."""


def front_of(name: str, dtype: Dtype, summaries: Sequence[Summary], *, rates: int) -> Front:
    """Return the front of the searches called `name`, by rising rate, of which there are to be `rates`.

    `summaries` is not empty.
    """
    first = summaries[0]
    return Front(
        name=name,
        model=first.model,
        fitness=first.fitness,
        reconstruction=first.reconstruction,
        dense=first.dense,
        points=tuple(_point(summary, 4 if dtype == "float32" else 2) for summary in summaries),
        finished=len(summaries) == rates and all(summary.finished for summary in summaries),
    )


def _point(summary: Summary, bytes_each: int) -> FrontPoint:
    figure = minimised(summary.fitness)
    best = None if summary.best is None else figure(summary.best)
    uniform = figure(summary.uniform)
    parameters = (summary.best or summary.uniform).parameters
    return FrontPoint(
        rate=summary.rate,
        search=summary.search,
        finished=summary.finished,
        evaluations=sum(summary.candidates["by_outcome"].values()),
        seconds=summary.seconds,
        weight_bytes=bytes_each * parameters.total_after,
        best=summary.best,
        uniform=summary.uniform,
        ratio=best / uniform if best is not None and uniform else None,
    )


def minimised(fitness: Measure) -> Callable[[Row], float | None]:
    """Return the function that takes the minimised figure from a row."""
    return (lambda row: row.kl) if fitness == "kl" else (lambda row: row.perplexity)


def show_front(front: Front, console: Console) -> None:
    """Print the front as a table, and under it the cost and the next step."""
    rates = ", ".join(f"{100 * point.rate:g} %" for point in front.points)
    console.print(f"{front.name}: {front.model} without {rates} of the decoder's parameters")
    console.print(_table(front))
    for line in _lines(front):
        console.print(line, soft_wrap=True)


def _table(front: Front) -> Table:
    uniform = uniform_label(front.reconstruction)
    has_report = front.dense.report_perplexity is not None
    table = Table()
    titles = ["removed", "parameters", "weights"]
    titles += [f"kl ÷ {uniform}", "kl"] if front.fitness == "kl" else [f"perplexity ÷ {uniform}"]
    titles += ["perplexity", "on the report text", f"{uniform}, on it"] if has_report else ["perplexity", uniform]
    for title in titles:
        table.add_column(title, justify="right")

    def figures(row: Row) -> list[str]:
        shown = [(row.kl, 4)] if front.fitness == "kl" else []
        shown += [(row.perplexity, 2), *([(row.report_perplexity, 2)] if has_report else [])]
        return [number(figure, digits) for figure, digits in shown]

    dense = front.dense
    table.add_row("dense", _millions(dense.parameters.total_before), "–", "–", *figures(dense), "–")
    for point in front.points:
        if point.best is None:
            table.add_row(f"{100 * point.rate:g} %", "no candidate could be measured")
            continue
        baseline = point.uniform.report_perplexity if has_report else point.uniform.perplexity
        size = _millions(point.best.parameters.total_after), f"{point.weight_bytes / 1e6:,.0f} MB"
        table.add_row(f"{100 * point.rate:g} %", *size, number(point.ratio, 3), *figures(point.best), number(baseline))
    return table


def _lines(front: Front) -> list[str]:
    evaluations = sum(point.evaluations for point in front.points)
    seconds = sum(point.seconds for point in front.points)
    lines = [WEAK_BASELINE] if front.reconstruction == "none" else []
    lines.append(f"{evaluations} evaluations, {seconds:,.0f} seconds")
    if not front.finished:
        return [*lines, "stopped before its end: run the same command again to resume"]
    measured = [point.rate for point in front.points if point.best is not None]
    if not measured:
        return lines
    low, high = measured[0], measured[-1]
    between = f", with any RATE from {low:g} to {high:g}" if high > low else ""
    return [*lines, f"next: selfpruner export --search {front.name} --rate RATE --out DIR{between}"]


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"
