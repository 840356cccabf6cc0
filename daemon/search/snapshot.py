"""The view of a round for the agents, which does not change during the round."""

from functools import partial
from itertools import islice

from agents.population.population import Evaluation, Population
from agents.population.view import Member, Tried, View
from daemon.search.state import SearchState
from protocol.plans.candidate import Measured, Stopped

SHOWN_BEST = 500
SHOWN_RECENT = 200
"""Maximum numbers of best and of recent candidates in a view, so that its cost does not grow with the search."""


def view_of_round(state: SearchState, size: int, round_: int) -> View:
    """Return what the agents see in a round; `size` is the population size."""
    measured = tuple(
        Member(e.candidate, e.outcome.fitness)
        for e in state.population.top(max(SHOWN_BEST, size), before=round_)
        if isinstance(e.outcome, Measured)
    )
    first = state.population.top(1, before=1)
    return View(
        spec=state.spec,
        profile=state.profile,
        round=round_,
        population=measured[:size],
        made=state.proposals.calls(round_),
        measured=measured,
        recent=_recent(state, round_),
        start=first[0].candidate.rates if first else None,
        at_other_rates=state.at_other_rates,
        lessons=state.lessons,
        fitness_of=partial(_fitness_of, state.population, before=round_),
    )


def _fitness_of(population: Population, candidate_id: str, before: int) -> float | None:
    evaluation = population.get(candidate_id)
    if evaluation is None or evaluation.candidate.provenance.round >= before:
        return None
    return _tried(evaluation).fitness


def _recent(state: SearchState, round_: int) -> tuple[Tried, ...]:
    """Return the last proposals of earlier rounds that have an outcome."""
    issued = (c for c in reversed(state.ledger.values()) if c.is_proposal and c.provenance.round < round_)
    known = (evaluation for c in issued if (evaluation := state.population.get(c.id)))
    return tuple(reversed([_tried(evaluation) for evaluation in islice(known, SHOWN_RECENT)]))


def _tried(evaluation: Evaluation) -> Tried:
    candidate, outcome = evaluation.candidate, evaluation.outcome
    if isinstance(outcome, Stopped) and candidate.race is not None:
        return Tried(candidate, outcome.guess(candidate.race), stopped=True)
    return Tried(candidate, outcome.fitness if isinstance(outcome, Measured) else None)
