"""One search to measure or to simulate: how many workers, how long an evaluation and an answer take, and the mode."""

from dataclasses import dataclass, replace
from random import Random

from daemon.search.in_flight import MOST_TOGETHER, SPARE, supply

VARIATION = 0.3
"""Times differ by up to this share, up and down."""


@dataclass(frozen=True)
class Case:
    """A search; all times in seconds."""

    workers: int
    evaluation: float
    """One candidate, measured by one worker."""
    answer: float
    """One answer of the LLM, whatever it is asked."""
    at_once: int = 4
    """Questions that the endpoint answers at once (llm.concurrency)."""
    mode: str = "generational"
    """`generational` or `steady-state`."""
    population: int = 16
    """Candidates of the first population."""
    offspring: int = 20
    """Candidates of a round."""
    candidates: int = 76
    """Candidates of the whole search."""
    overhead: float = 0.0
    """What daemon and queue take for a candidate, one after the other."""
    refused: float = 0.0
    """Share of the proposals that are refused, after which the LLM is asked again."""

    @property
    def together(self) -> int:
        """The candidates that a question asks for in a steady state, if an answer with several takes no longer."""
        count = 1
        while (
            2 * count <= MOST_TOGETHER
            and supply(self.answer, count, self.workers, self.evaluation, self.at_once) < SPARE
        ):
            count *= 2
        return count

    def in_steady_state(self) -> "Case":
        """Return the same search in the mode `steady-state`."""
        return replace(self, mode="steady-state")


def varied(seconds: float, rng: Random) -> float:
    """Return a time near `seconds`."""
    return seconds * rng.uniform(1 - VARIATION, 1 + VARIATION)
