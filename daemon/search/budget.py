"""The budget of a search in rounds, evaluations, tokens and hours."""

from collections import Counter
from collections.abc import Callable

import structlog

from agents.population.population import Evaluation
from daemon.search.state import Proposals, SearchState
from daemon.settings.search import SearchSettings
from protocol.plans.candidate import Failed

log = structlog.get_logger()


class Budget:
    """The budget of one search; `seconds` returns its running time, summed over restarts."""

    def __init__(self, settings: SearchSettings, state: SearchState, seconds: Callable[[], float]) -> None:
        self._settings, self._seconds = settings, seconds
        self._proposals: Proposals = state.proposals
        self._time_is_up = False
        self._tokens: Counter[int] = Counter()
        """Number of tokens measured for the candidates of each round."""
        for evaluation in state.population:
            self.count(evaluation)

    def count(self, evaluation: Evaluation) -> None:
        """Count the tokens that a candidate of the agents was measured on."""
        candidate, outcome = evaluation.candidate, evaluation.outcome
        if candidate.provenance.agent != "baseline" and not isinstance(outcome, Failed):
            self._tokens[candidate.provenance.round] += outcome.tokens

    @property
    def remaining(self) -> int:
        """Number of candidates that may still be proposed; 0 after search.budget_hours."""
        return 0 if self._hours_are_over() else self._settings.planned - self.proposed

    @property
    def proposed(self) -> int:
        """Number of candidates proposed so far."""
        return len(self._proposals)

    def tokens_are_used_up(self, *, before: int | None = None) -> bool:
        """Whether search.max_tokens are used up. With `before`, only the tokens of earlier rounds count.

        The decision to begin a round then does not depend on how much of that round was already measured.
        """
        most = self._settings.max_tokens
        if most is None:
            return False
        return sum(tokens for round_, tokens in self._tokens.items() if before is None or round_ < before) >= most

    def _hours_are_over(self) -> bool:
        hours = self._settings.budget_hours
        if hours is not None and not self._time_is_up and self._seconds() >= 3600 * hours:
            self._time_is_up = True
            log.info("search_hours_used_up", hours=hours, candidates=self.proposed)
        return self._time_is_up
