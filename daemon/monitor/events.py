"""Events: changes between two observations of a search, for the HTTP API and `selfpruner watch`. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from agents.population.population import Evaluation
from daemon.monitor.status import Observation, Status, Tally, make_status
from protocol.plans.candidate import Measured, outcome_fields

_STATES = {
    "redis": "redis_changed",
    "control": "control_changed",
    "daemon": "daemon_changed",
    "degraded": "degraded_changed",
    "finished": "finished_changed",
}
"""Fields of the status, each with the event that reports its new value."""


@dataclass(frozen=True)
class Event:
    """A change of a search; `fields` can be written as JSON."""

    name: str
    fields: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """Return the event as one flat JSON object."""
        return {"event": self.name, **self.fields}


class StatusTracker:
    """Keeps the status of a search and derives events. The first observation gives no events."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.status: Status | None = None

    def update(self, observation: Observation) -> list[Event]:
        """Update `status`. Returns the events since the last observation."""
        evaluations = self.tally.take(observation.ledger, observation.population)
        before, self.status = self.status, make_status(observation, self.tally)
        if before is None:
            return []
        return [*changes(before, self.status), *(evaluation_event(e, best=best) for e, best in evaluations)]

    def redis_is_away(self) -> list[Event]:
        """Note that Redis cannot be read, and return the resulting events. Call this instead of `update`."""
        if self.status is None:
            return []
        before, self.status = self.status, self.status.model_copy(update={"redis": "away"})
        return list(changes(before, self.status))


def changes(before: Status, after: Status) -> Iterator[Event]:
    """Yield the differences between two statuses, except for candidates."""
    for name, event in _STATES.items():
        if getattr(before, name) != getattr(after, name):
            yield Event(event, {name: getattr(after, name)})
    if after.round > before.round:
        yield Event("round_started", {"round": after.round})
    old = {worker.consumer: worker for worker in before.workers}
    new = {worker.consumer: worker for worker in after.workers}
    for consumer in old.keys() - new.keys():
        yield Event("worker_left", {"worker": consumer})
    for consumer, worker in new.items():
        if consumer not in old:
            yield Event("worker_joined", {"worker": consumer, "stage": worker.stage})
        elif worker.stage == "unusable" != old[consumer].stage:
            yield Event("worker_unusable", {"worker": consumer, "detail": worker.detail})


def evaluation_event(evaluation: Evaluation, *, best: bool) -> Event:
    """Return the event of a candidate's outcome, with the name and the fields of the daemon's log entry."""
    outcome = evaluation.outcome
    fields = outcome_fields(evaluation.candidate, outcome)
    return Event(f"candidate_{outcome.kind}", {**fields, "is_best": best} if isinstance(outcome, Measured) else fields)
