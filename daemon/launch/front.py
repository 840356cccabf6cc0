"""Searches for several rates: what one learns from another, their run one after the other, and rates in between."""

from collections.abc import Callable
from pathlib import Path
from signal import Signals

from pydantic import ValidationError

from agents.population.view import Member
from daemon.monitor.charts import draw_front
from daemon.monitor.front import FRONT, FRONT_CHART, Front, front_of
from daemon.monitor.record import SearchRecord
from daemon.monitor.summary import Summary
from daemon.settings.settings import Settings
from daemon.state.journal import json_text, saved, saved_spec
from daemon.state.store import difference
from protocol.errors import SearchExistsError, SettingsError, UsageError
from protocol.plans.allocation import PruningRequest
from protocol.plans.candidate import Measured
from protocol.runtime.files import write_atomically

LEARNED = 100
"""Maximum number of candidates of each search that another search learns from, best first."""
MAY_DIFFER = ("rate", "lowest_rate", "highest_rate", "multiple_of")
"""Settings in which a search may differ from one that it learns from: they change plans, but not what is measured."""


def read_other_rates(settings: Settings) -> tuple[tuple[Member, ...], ...]:
    """Return the best members of each search of search.learn_from.

    Raises SettingsError for a search that is missing, or that measured something else.
    """
    return tuple(_members(settings, name) for name in settings.search.learn_from)


def _members(settings: Settings, name: str) -> tuple[Member, ...]:
    try:
        record = SearchRecord.read(settings.run.folder / name)
    except UsageError as error:
        raise SettingsError(f"search.learn_from: {error}") from error
    mine = settings.spec()
    theirs = record.spec.model_copy(update={name: getattr(mine, name) for name in MAY_DIFFER})
    if theirs != mine:
        raise SettingsError(
            f"search.learn_from: the search {name} measured something else ({difference(theirs, mine)})"
        )
    found = record.population.top(LEARNED)
    return tuple(Member(e.candidate, e.outcome.fitness) for e in found if isinstance(e.outcome, Measured))


RunSearch = Callable[[Settings], tuple[Summary | None, Signals | None]]
"""Runs a search to its end, or until a signal comes."""


def run_front(settings: Settings, run_search: RunSearch) -> tuple[Front | None, Signals | None]:
    """Search for each rate of target.rates in turn, and write the front to the folder of their name after each.

    A search that has proposed all its candidates is not run again. Return the front, None if nothing is known yet, and
    the signal that ended it, if one did. Raises SearchExistsError if a folder holds a search that is not of this front.
    """
    summaries: list[Summary] = []
    front, interrupted = None, None
    parts = settings.of_each_rate
    if saved_spec(settings.folder) is not None:
        raise SearchExistsError(f"{settings.folder} holds a search at one rate: give this front another search.name")
    for each in parts:
        _check_free(each)
    for each in parts:
        found = _ended_before(each)
        if found is None:
            found, interrupted = run_search(each)
        if found is not None:
            summaries.append(found)
            front = front_of(settings.search.name, settings.target.dtype, summaries, rates=len(parts))
            write_front(settings.folder, front)
        if interrupted is not None or found is None or not found.finished:
            break
    return front, interrupted


def _check_free(settings: Settings) -> None:
    """Raise SearchExistsError if the folder holds a search with other settings."""
    theirs, mine = saved_spec(settings.folder), settings.spec()
    if theirs is not None and theirs != mine:
        raise SearchExistsError(
            f"{settings.folder} holds a search with other settings ({difference(theirs, mine)}): give this front "
            "another search.name, or move that folder away"
        )


def _ended_before(settings: Settings) -> Summary | None:
    """Return the result of a search that has done all that its settings ask for; None if there is none."""
    try:
        record = SearchRecord.read(settings.folder)
    except UsageError:
        return None
    is_done = record.finished and len(record.proposals) >= settings.search.planned
    return record.summary if is_done and record.spec == settings.spec() else None


def write_front(folder: Path, front: Front) -> None:
    """Write a front and its drawing. Raises SettingsError if the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FRONT, json_text(front.model_dump()))
        write_atomically(folder / FRONT_CHART, draw_front(front).on_white)
    except OSError as error:
        raise SettingsError(f"run.folder: {folder} cannot be written: {error.strerror}") from error


def read_front(folder: Path) -> Front:
    """Read the front in `folder`. Raises UsageError if there is none, or its searches have not ended."""
    record = saved(folder, FRONT)
    try:
        front = None if record is None else Front.model_validate(record)
    except ValidationError as error:
        raise UsageError(f"{folder / FRONT} is damaged, or of another version") from error
    if front is None:
        raise UsageError(f"{folder} holds no searches at several rates: --rate with --search needs target.rates")
    if not front.finished:
        raise UsageError(f"the searches of {front.name} have not ended: run the same command again to resume them")
    return front


def request_at(folder: Path, front: Front, rate: float) -> PruningRequest:
    """Return the request for a rate between two of the front's: rates between those of their best candidates.

    Raises SettingsError if the front does not reach to this rate.
    """
    points = [point for point in front.points if point.best is not None]
    below = [point for point in points if point.rate <= rate]
    above = [point for point in points if point.rate >= rate]
    if not below or not above:
        known = [f"{point.rate:g}" for point in points]
        raise SettingsError(f"--rate {rate:g} is not between two of the front's rates ({', '.join(known)})")
    low, high = (SearchRecord.read(folder.parent / point.search) for point in (below[-1], above[0]))
    share = (rate - low.spec.rate) / ((high.spec.rate - low.spec.rate) or 1.0)
    mixed = [(1 - share) * a + share * b for a, b in zip(_best_rates(low), _best_rates(high), strict=True)]
    spec, shape = low.spec.model_copy(update={"rate": rate}), low.profile.shape
    where = f"{below[-1].search} and {above[0].search}"
    return PruningRequest(spec, spec.feasible(mixed, shape), shape, f"between the searches {where}")


def _best_rates(record: SearchRecord) -> tuple[float, ...]:
    best = record.population.best()
    assert best is not None, "a point of the front has a best candidate"
    return best.candidate.rates
