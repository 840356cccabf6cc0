"""The figures that are always shown together: the best candidate beside uniform pruning and the dense model. Pure."""

import functools
from dataclasses import dataclass
from typing import Any

from agents.population.population import Evaluation, Population
from protocol.plans.candidate import Measured, candidate_id
from protocol.plans.profile import ModelProfile
from protocol.plans.shape import ModelShape
from protocol.plans.spec import FIGURE_DIGITS, Measure, SearchSpec


@dataclass(frozen=True)
class Figures:
    """The minimised figure of each model, a perplexity or a divergence. None means not measured yet."""

    measure: Measure
    best: float | None
    uniform: float | None
    """The figure of uniform pruning, with the search's reconstruction."""
    dense: float | None

    @property
    def ratio(self) -> float | None:
        """The best divided by uniform: below 1, the search has gained something."""
        return self.best / self.uniform if self.best is not None and self.uniform else None

    def shown(self, value: float | None) -> str:
        """Return a figure with the digits that distinguish candidates."""
        return "–" if value is None else f"{value:,.{FIGURE_DIGITS[self.measure]}f}"

    def in_words(self) -> str:
        """Return `best 48.50 = 0.895 × uniform 54.20, dense 29.00`; without dense for a divergence."""
        ratio = "," if self.ratio is None else f" = {self.ratio:.3f} ×"
        dense = f", dense {self.shown(self.dense)}" if self.measure == "perplexity" else ""
        return f"best {self.shown(self.best)}{ratio} uniform {self.shown(self.uniform)}{dense}"

    def fields(self) -> dict[str, Any]:
        """Return the figures as fields of the log, rounded to six decimals."""
        values = {"best": self.best, "uniform": self.uniform, "dense": self.dense, "ratio": self.ratio}
        return {name: value if value is None else round(value, 6) for name, value in values.items()}


def figures_of(spec: SearchSpec, profile: ModelProfile, population: Population) -> Figures:
    """Return the figures on the fitness text."""
    best, uniform = population.best(), uniform_outcome(spec, profile, population)
    return Figures(
        measure=spec.measure,
        best=best.outcome.fitness if best and isinstance(best.outcome, Measured) else None,
        uniform=uniform.fitness if uniform else None,
        dense=0.0 if spec.measure == "kl" else profile.dense.perplexity,
    )


def best_allocation(population: Population) -> Evaluation | None:
    """Return the best allocation in the first population, or None if there is no allocation in it."""
    return next((each for each in population.top(None) if each.candidate.provenance.source == "allocation"), None)


def best_rule(population: Population) -> Evaluation | None:
    """Return the best candidate whose rates come from a rule that the search has made, or None if it made none."""
    origins = ((each, each.candidate.provenance) for each in population.top(None))
    return next((each for each, origin in origins if origin.rule and origin.source != "allocation"), None)


def reported(population: Population) -> dict[str, Evaluation]:
    """Return the candidates that are measured on the report text at the end, by their names."""
    best = {"best": population.best()}
    found = best | {"best allocation": best_allocation(population), "best rule": best_rule(population)}
    return {name: each for name, each in found.items() if each is not None}


def uniform_outcome(spec: SearchSpec, profile: ModelProfile, population: Population) -> Measured | None:
    """Return the outcome of uniform pruning on the fitness text; None if it was not measured (yet)."""
    found = population.get(_uniform_id(spec, profile.shape))
    return found.outcome if found and isinstance(found.outcome, Measured) else None


@functools.lru_cache(maxsize=8)
def _uniform_id(spec: SearchSpec, shape: ModelShape) -> str:
    return candidate_id(spec.uniform_plan(shape), spec.fingerprint)
