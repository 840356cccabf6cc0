"""Recovery from the folder's copy `evaluations.jsonl` if the server lost data while no daemon ran.

The copy does not contain candidates without an outcome, or the parents selected in an incomplete round. After a
restart, the agents ask for them again and find the answers in the transcript.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from agents.population.population import Population
from daemon.state.history import History
from daemon.state.journal import EVALUATIONS, STATUS_FILE, TRANSCRIPT, saved, saved_spec
from daemon.state.store import difference
from protocol.errors import SearchExistsError, UsageError
from protocol.plans.candidate import OUTCOME, Candidate, Outcome, Provenance, Race, candidate_id
from protocol.plans.plan import LayerPlan, Plan
from protocol.plans.spec import SearchSpec
from protocol.queue.control import Command


class _LastStatus(BaseModel):
    """The fields of status.json that recovery needs."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    control: str = "run"
    tokens: dict[str, int] = {}
    cost: float = 0.0
    seconds: float = 0.0


def _last_status(folder: Path) -> _LastStatus:
    """Return the last status file, or the defaults if it is missing or unreadable."""
    try:
        return _LastStatus.model_validate(saved(folder, STATUS_FILE) or {})
    except (UsageError, ValidationError):
        return _LastStatus()


def recovered(folder: Path, spec: SearchSpec, history: History) -> History | None:
    """Return the server's `history` plus the evaluations that only the copy in `folder` has; None if there are none.

    Raises SearchExistsError if the copy is of a search with another spec, and UsageError if it cannot be read.
    Otherwise the daemon would overwrite it.
    """
    path = folder / EVALUATIONS
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if not lines:
        return None
    _check_spec(folder, spec, len(lines))
    lost: list[tuple[Candidate, Outcome]] = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue  # the last line was cut off by a kill
        try:
            record = json.loads(line)
            if record["id"] not in history.population:
                lost.append(_evaluation(record, spec))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            if history.population.outcomes >= len(lines):
                continue  # the server has all evaluations of the copy
            raise UsageError(
                f"Redis has lost evaluations of this search, and line {number} of their copy {path} cannot be read: "
                "repair or delete that line, or move the folder away to start over"
            ) from error
    if not lost:
        return None
    population = Population()
    for candidate, outcome in [*((e.candidate, e.outcome) for e in history.population), *lost]:
        population.insert(candidate, outcome)
    ledger = history.ledger | {candidate.id: candidate for candidate, _ in lost}
    return History(ledger, population, counters(folder, history), history.selections)


def saved_command(folder: Path) -> Command | None:
    """Return `pause` if the search was paused when the last status was written."""
    return "pause" if _last_status(folder).control == "pause" else None


def _check_spec(folder: Path, spec: SearchSpec, evaluations: int) -> None:
    """Raise SearchExistsError for a copy with another spec. Without a readable spec, candidates' ids are checked."""
    try:
        theirs = saved_spec(folder)
    except UsageError:
        return
    if theirs and theirs.fingerprint != spec.fingerprint:
        raise SearchExistsError(
            f"{folder} holds {evaluations} evaluations of a search with other settings ({difference(theirs, spec)}), "
            "which would be overwritten: give this one another search.name, or move that folder away"
        )


def _evaluation(record: dict[str, Any], spec: SearchSpec) -> tuple[Candidate, Outcome]:
    """Parse a record made by evaluation_record. Raises ValueError if its id does not match its plan and this spec."""
    provenance = {name: record[name] for name in Provenance.model_fields if name in record}
    layers = (dict(zip(LayerPlan.model_fields, layer, strict=True)) for layer in record["plan"])
    plan = Plan(layers=tuple(LayerPlan.model_validate(layer) for layer in layers))
    candidate = Candidate(
        id=record["id"],
        rates=tuple(record["rates"]),
        plan=plan,
        provenance=Provenance.model_validate(provenance),
        text=record["text"],
        race=Race.model_validate(record["race"]) if "race" in record else None,
    )
    if candidate.id != candidate_id(plan, spec.fingerprint, candidate.text):
        raise ValueError("it belongs to another search")
    return candidate, OUTCOME.validate_python(record["outcome"])


def counters(folder: Path, history: History) -> dict[str, float]:
    """Return lower bounds of the resources that the search has used, because lost data must not enlarge a budget."""
    status = _last_status(folder)
    transcript = folder / TRANSCRIPT
    found = {"requests": float(transcript.read_bytes().count(b"\n")) if transcript.is_file() else 0.0}
    found |= {f"{name}_tokens": float(tokens) for name, tokens in status.tokens.items()}
    found |= {"cost": status.cost, "seconds": status.seconds}
    return history.counters | {name: max(used, history.counters.get(name, 0.0)) for name, used in found.items()}
