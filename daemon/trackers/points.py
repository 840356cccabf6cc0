"""The curves of a search: one point for each candidate with an outcome. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from agents.population.population import Evaluation, Population
from daemon.monitor.status import llm_tokens
from daemon.search.figures import Figures, uniform_outcome
from protocol.plans.candidate import Measured
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec

ALWAYS = "llm/completion_tokens"
"""A curve that has a value at every step."""


@dataclass(frozen=True)
class Point:
    """The values of curves at one step, which is the number of evaluations."""

    step: int
    values: dict[str, float]


class Curves:
    """Makes points of the outcomes of a search, in their order, each once.

    Curves are the candidate's `fitness`, the figures so far (`best`, `uniform`, `dense`, `best_to_uniform`), the LLM's
    tokens, and at each new best candidate the rate of each unit, such as `rates/attention 3`.
    """

    def __init__(self, spec: SearchSpec, profile: ModelProfile) -> None:
        self._spec, self._profile = spec, profile
        self._units = [unit.name for unit in profile.shape.units(spec.granularity)]
        self._taken = self._steps = 0
        self._best: float | None = None

    def take(self, population: Population, counters: Mapping[str, float]) -> Iterator[Point]:
        """Yield the points of outcomes that are new since the last call. `counters` has the LLM's tokens."""
        uniform = uniform_outcome(self._spec, self._profile, population)
        tokens = {f"llm/{name}_tokens": float(count) for name, count in llm_tokens(counters).items()}
        for evaluation in population.newest(population.outcomes - self._taken):
            self._taken += 1
            if evaluation.candidate.is_proposal:
                self._steps += 1
                values = self._values(evaluation, uniform.fitness if uniform else None)
                yield Point(self._steps, values | tokens)

    def _values(self, evaluation: Evaluation, uniform: float | None) -> dict[str, float]:
        values: dict[str, float] = {}
        if isinstance(evaluation.outcome, Measured):
            fitness = values["fitness"] = evaluation.outcome.fitness
            if self._best is None or fitness < self._best:
                self._best = fitness
                rates = zip(self._units, evaluation.candidate.rates, strict=True)
                values |= {f"rates/{unit}": rate for unit, rate in rates}
        dense = 0.0 if self._spec.measure == "kl" else self._profile.dense.perplexity
        figures = Figures(self._spec.measure, self._best, uniform, dense)
        shown = {"best": self._best, "uniform": uniform, "dense": dense, "best_to_uniform": figures.ratio}
        return values | {name: value for name, value in shown.items() if value is not None}
