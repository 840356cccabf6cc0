"""The tables of `selfpruner status` and the screen of `selfpruner watch`: state, best candidates, workers, events."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from agents.population.population import Evaluation
from daemon.monitor.events import Event
from daemon.monitor.status import Status
from daemon.search.figures import Figures
from protocol.plans.candidate import Measured

SHOWN_MEMBERS = 5
SHOWN_EVENTS = 20
FEWEST_EVENTS = 3
OVERVIEW_LINES = 9
RATE_SECONDS = 120.0


class Screen:
    """Keeps the last events and the rate of measurements, which a status does not contain."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events: deque[str] = deque(maxlen=SHOWN_EVENTS)
        self._counts: deque[tuple[float, int]] = deque()

    def take(self, status: Status, events: Sequence[Event]) -> None:
        """Record a new status and new events."""
        moment = datetime.now().strftime("%H:%M:%S")
        self._events.extend(f"{moment}  {in_words(event)}" for event in events)
        now = self._clock()
        self._counts.append((now, status.measured + status.failed + status.stopped))
        while now - self._counts[0][0] > RATE_SECONDS:
            self._counts.popleft()

    @property
    def per_minute(self) -> float | None:
        """Candidates measured per minute over the last two minutes; None during the first five seconds."""
        (first, before), (last, now) = self._counts[0], self._counts[-1]
        return 60 * (now - before) / (last - first) if last - first >= 5 else None

    def render(self, status: Status, members: Sequence[Evaluation], height: int = 50) -> RenderableType:
        """Return the whole screen, with as many events as fit in `height` lines."""
        taken = OVERVIEW_LINES + 2 + len(members) + 2 + len(status.workers)
        events = list(self._events)[-max(FEWEST_EVENTS, height - taken - 1) :]
        return Group(
            _overview(status, self.per_minute),
            _members(status, members),
            _workers(status),
            *(_plain(event, "dim") for event in events),
        )


SOURCES = {"llm": "LLM", "allocation": "seeds"}
"""Names of candidate sources on a screen, if they differ from the names in the status."""


def status_tables(status: Status) -> Iterator[RenderableType]:
    """Yield the tables of a status: overview, workers, endpoints and failed jobs."""
    yield _overview(status)
    if status.workers:
        yield _workers(status)
    if status.endpoints:
        yield _endpoints(status)
    if status.dead:
        yield _dead(status)


def list_table(found: Mapping[str, Status | None]) -> Iterator[RenderableType]:
    """Yield the table of all searches; None is a status that cannot be read."""
    if not found:
        yield Text("there is no search here")
        return
    table = Table(box=None)
    for column in ("search", "model", "removed", "state", "measured", "best ÷ uniform"):
        table.add_column(column, justify="right" if column in ("removed", "measured", "best ÷ uniform") else "left")
    for name, status in found.items():
        if status is None:
            table.add_row(_plain(name), "", "", Text("cannot be read; `status` says why", "red"), "", "")
            continue
        ratio = status.best_to_uniform
        shown = "–" if ratio is None else f"{ratio:.3f}"
        table.add_row(
            _plain(name), _plain(status.model), f"{status.rate:.0%}", _state(status), f"{status.measured:,}", shown
        )
    yield table


def _overview(status: Status, per_minute: float | None = None) -> RenderableType:
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    pace = "" if per_minute is None else f"; {per_minute:.1f} per minute"
    table.add_row("state", _state(status))
    table.add_row("round", f"{status.round}, parents chosen by {status.parents_source or '–'}")
    stopped = f", {status.stopped} stopped early" if status.stopped else ""
    table.add_row("candidates", f"{status.measured} measured, {status.failed} failed{stopped}{pace}")
    made = [f"{SOURCES.get(name, name)} {count}" for name, count in status.by_source.items()]
    table.add_row("made by", ", ".join(made))
    table.add_row("queue", f"{status.queue.queued} queued, {status.queue.running} running")
    table.add_row("kl" if status.fitness == "kl" else "perplexity", status.figures.in_words())
    if status.fitness == "kl":
        plain = Figures("perplexity", status.best_perplexity, status.uniform_perplexity, status.dense_perplexity)
        table.add_row("perplexity", plain.in_words())
    table.add_row("tokens", f"{status.tokens.get('prompt', 0):,} in, {status.tokens.get('completion', 0):,} out")
    table.add_row("time", f"{status.seconds:,.0f} s")
    return Group(_plain(f"{status.search}: {status.model}, {status.rate:.0%} removed", "bold"), table)


def in_words(event: Event) -> str:
    """Return an event as one line."""
    fields = " ".join(f"{name}={_short(value)}" for name, value in event.fields.items() if value is not None)
    return f"{event.name.replace('_', ' ')}  {fields}"


def _state(status: Status) -> Text:
    if status.redis == "away":
        return Text("Redis does not answer; this is the last known status", "red")
    if status.daemon is None:
        return Text("finished" if status.finished else "stopped", "green" if status.finished else "yellow")
    if status.control == "pause" and (status.queue.running or any(w.stage == "evaluating" for w in status.workers)):
        return Text("pausing; the evaluation in progress will complete", "yellow")
    if status.control != "run":
        return Text({"pause": "paused", "stop": "stopping"}[status.control], "yellow")
    if status.degraded:
        why = "the LLM budget is used up" if status.degraded_by == "budget" else "no LLM endpoint answers"
        return Text(f"degraded: {why}; classical operators propose", "yellow")
    return Text("running" if status.workers else "waiting for a worker", "green" if status.workers else "yellow")


def _members(status: Status, members: Sequence[Evaluation]) -> RenderableType:
    table = Table(title="best candidates", box=None, title_justify="left")
    for column in ("rank", "id", "kl" if status.fitness == "kl" else "perplexity", "agent", "source", "round"):
        table.add_column(column, justify="right" if column in ("rank", "perplexity", "kl", "round") else "left")
    for rank, member in enumerate(members, start=1):
        if isinstance(member.outcome, Measured):
            who = member.candidate.provenance
            fitness = f"{member.outcome.fitness:,.4f}"
            table.add_row(str(rank), _plain(member.candidate.id), fitness, who.agent, who.source, str(who.round))
    return table


def _workers(status: Status) -> RenderableType:
    table = Table(title="workers", box=None, title_justify="left")
    for column in ("worker", "doing", "measured"):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for worker in status.workers:
        share = f" {worker.done}/{worker.total}" if worker.total and worker.stage not in ("idle", "evaluating") else ""
        doing = _plain(f"{worker.stage}{share} {worker.detail}".strip())
        table.add_row(_plain(worker.consumer), doing, str(worker.measured))
    return table


def _endpoints(status: Status) -> RenderableType:
    table = Table(title="LLM endpoints", box=None, title_justify="left")
    for column in ("endpoint", "state", "requests", "errors"):
        table.add_column(column, justify="left" if column in ("endpoint", "state") else "right")
    for name, endpoint in status.endpoints.items():
        state = _plain(endpoint.state + (f": {endpoint.reason}" if endpoint.reason else ""))
        table.add_row(_plain(name), state, f"{endpoint.requests:,}", f"{endpoint.errors:,}")
    return table


def _dead(status: Status) -> RenderableType:
    table = Table(title=f"failed jobs (last {len(status.dead)})", box=None, title_justify="left")
    for column in ("id", "worker", "why"):
        table.add_column(column)
    for job in status.dead[:SHOWN_MEMBERS]:
        why = job.get("detail") or job.get("reason", "")
        table.add_row(*(_plain(text) for text in (job.get("id", ""), job.get("worker", ""), why)))
    return table


def _plain(text: str, style: str = "") -> Text:
    """Return text from Redis without markup and without control characters."""
    return Text("".join(c if c.isprintable() else "?" for c in text), style)


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
