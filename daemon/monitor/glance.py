"""One glance at a search on a terminal: the progress of the best candidate, and what it removes where, as bars."""

import math
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from agents.population.population import Population
from daemon.search.figures import uniform_outcome
from protocol.plans.profile import ModelProfile
from protocol.plans.shape import BlockKind
from protocol.plans.spec import FIGURE_DIGITS, Measure, SearchSpec

BLOCKS, DIGITS = "·▁▂▃▄▅▆▇█", ".12345678"
"""Marks of a bar's height: of a unit that is kept whole, then from the lowest to the highest."""
LABEL, FIGURES = 20, 16
"""Columns of the names on the left, and of the figures on the right."""
WIDEST = 100
"""Columns of the drawing, at most: a file has no width of its own."""
KINDS: dict[BlockKind, str] = {"layer": "layers", "attention": "attention", "mlp": "MLP"}
AGREEMENT = "sensitive: harm if this one alone is pruned; such units should be pruned little"
Improvements = Sequence[tuple[int, float]]
"""Number of evaluations and the best fitness after them, at each improvement."""


class Line(NamedTuple):
    """One line of a terminal, with the style of Rich."""

    text: str
    style: str = ""


class Glance(BaseModel):
    """What a terminal draws of a search whose first candidate is measured."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    measure: Measure
    uniform: float | None
    """Fitness of uniform pruning, by which the others are divided; None if it was not measured."""
    evaluations: int
    """Proposed candidates with an outcome."""
    improvements: tuple[tuple[int, float], ...] = Field(min_length=1)
    """For each new best, the number of evaluations until then, and its fitness."""
    rates: dict[BlockKind, Annotated[tuple[float, ...], Field(min_length=1)]] = Field(min_length=1)
    """The best candidate's pruning rates by depth, for layers, or for attention and MLP apart."""
    sensitivity: dict[BlockKind, tuple[float, ...]]
    """Sensitivities of the same units; empty if they were not measured."""

    @classmethod
    def of(
        cls,
        spec: SearchSpec,
        profile: ModelProfile,
        population: Population,
        evaluations: int,
        improvements: Improvements,
    ) -> "Glance | None":
        """Return the glance at a search; None before its first candidate is measured."""
        best, uniform = population.best(), uniform_outcome(spec, profile, population)
        if best is None:
            return None
        kinds = [unit.kind for unit in profile.shape.units(spec.granularity)]

        def by_kind(values: Sequence[float]) -> dict[BlockKind, tuple[float, ...]]:
            pairs = list(zip(kinds, values, strict=False))  # there may be no sensitivity
            return {kind: tuple(value for of, value in pairs if of == kind) for kind in dict.fromkeys(kinds) if pairs}

        return cls(
            measure=spec.measure,
            uniform=uniform.fitness if uniform else None,
            evaluations=evaluations,
            improvements=tuple(improvements),
            rates=by_kind(best.candidate.rates),
            sensitivity=by_kind(profile.sensitivity),
        )

    @property
    def height(self) -> int:
        """Return the number of lines."""
        return sum(1 for _ in self.lines(0, BLOCKS))

    def lines(self, width: int, marks: str) -> Iterator[Line]:
        """Yield the lines, for a terminal of `width` columns; `marks` are BLOCKS or DIGITS."""
        yield from self._progress(width - LABEL, marks)
        room = max(1, width - LABEL - FIGURES)
        layers = max(map(len, self.rates.values()))
        together = math.ceil(layers / room)
        top = max(max(rates) for rates in self.rates.values())
        for kind, whole in self.rates.items():
            rates = _means(whole, together)
            figures = f"{min(whole):.0%} to {max(whole):.0%}"
            yield Line(f"{KINDS[kind]:<10}{'removed':<10}{_rates(rates, top, marks)}  {figures}", "cyan")
            if sensitivity := _means(self.sensitivity.get(kind, ()), together):
                bars = _bars(sensitivity, 0.0, max(sensitivity), marks)
                yield Line(f"{'':<10}{'sensitive':<10}{bars}  up to {max(self.sensitivity[kind]):.2g}", "magenta")
        bar = "1 layer" if together == 1 else f"{together} layers"
        yield Line(f"each bar: {bar}, the first is left; removed: share pruned away ({marks[0]} kept whole)", "dim")
        if self.sensitivity:
            yield Line(AGREEMENT, "dim")

    def _progress(self, room: int, marks: str) -> Iterator[Line]:
        """Yield a curve of the best fitness against evaluations, and its first and last value in words."""
        unit = self.uniform or 1.0
        name = f"best {'÷' if marks is BLOCKS else '/'} uniform" if self.uniform else f"best {self.measure}"
        columns = max(1, min(room, self.evaluations))
        ends = [math.ceil((i + 1) * self.evaluations / columns) for i in range(columns)]
        curve = [min((best for number, best in self.improvements if number <= end), default=None) for end in ends]
        first, last = self.improvements[0][1], self.improvements[-1][1]
        known = [best for best in curve if best is not None]
        bars = _bars(known, last if last < max(known) else 0.0, max(known), marks)
        yield Line(f"{name:<{LABEL}}{bars:>{columns}}", "green")
        gain = "; below 1 is a gain" if self.uniform else ""
        digits = 3 if self.uniform else FIGURE_DIGITS[self.measure]
        change = f"{first / unit:.{digits}f} to {last / unit:.{digits}f}"
        words = f"{change} in {self.evaluations:,} evaluations{gain}"
        yield Line(f"{'':<{LABEL}}{words}")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the lines; none is wrapped, and a terminal without block characters gets digits."""
        for line in self.lines(min(options.max_width, WIDEST), DIGITS if options.ascii_only else BLOCKS):
            yield Text(line.text, line.style, no_wrap=True, overflow="crop")


def _means(values: Sequence[float], together: int) -> list[float]:
    return [mean(values[i : i + together]) for i in range(0, len(values), together)]


def _bars(values: Sequence[float], low: float, high: float, marks: str) -> str:
    """Return a bar for each value, the highest for `high`."""
    shares = (min(max((value - low) / (high - low or 1.0), 0.0), 1.0) for value in values)
    return "".join(marks[1 + round((len(marks) - 2) * share)] for share in shares)


def _rates(rates: Sequence[float], top: float, marks: str) -> str:
    """Return a bar for each rate; what rounds to 0 % has the mark of a unit that is kept whole."""
    bars = _bars(rates, 0.0, top, marks)
    return "".join(bar if round(rate, 2) else marks[0] for rate, bar in zip(rates, bars, strict=True))
