"""The tables of `selfpruner status` and the screen of `selfpruner watch`: state, glance, workers, best candidates."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from agents.population.population import Evaluation
from daemon.monitor.events import Event
from daemon.monitor.status import Status
from daemon.search.figures import Figures
from protocol.plans.candidate import SOURCE_NAMES, Measured
from protocol.queue.worker_status import WorkerStatus

SHOWN_MEMBERS = 5
SHOWN_EVENTS = 20
FEWEST_EVENTS = 2
HEAD_LINES = 2
"""Lines of a table above its rows."""
RATE_SECONDS = 120.0
UNITS = ((3600, "h"), (60, "min"), (1, "s"))


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
        """Return the whole screen: whatever comes later gets the rest of `height` lines. No line is wrapped."""
        facts = _cropped(_facts(status, self.per_minute))
        parts: list[RenderableType] = [_title(status), facts]
        room = height - 2 - facts.row_count
        if status.glance:
            parts.append(status.glance)
            room -= status.glance.height
        workers = _cropped(_workers(status, max(1, room - HEAD_LINES - FEWEST_EVENTS)))
        room -= HEAD_LINES + workers.row_count
        if best := members[: max(0, room - HEAD_LINES - FEWEST_EVENTS)]:
            parts.append(_cropped(_members(status, best)))
            room -= HEAD_LINES + len(best)
        events = list(self._events)[-max(FEWEST_EVENTS, room) :]
        return Group(*parts, workers, *(plain(event, "dim", no_wrap=True) for event in events))


def status_tables(status: Status) -> Iterator[RenderableType]:
    """Yield the tables of a status: the search, a glance at it, workers, endpoints and failed jobs."""
    yield _title(status)
    yield _facts(status)
    if status.glance:
        yield status.glance
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
            table.add_row(plain(name), "", "", Text("cannot be read; `status` says why", "red"), "", "")
            continue
        ratio = status.best_to_uniform
        shown = "–" if ratio is None else f"{ratio:.3f}"
        table.add_row(
            plain(name), plain(status.model), f"{status.rate:.0%}", _state(status), f"{status.measured:,}", shown
        )
    yield table


def unit_of_time(seconds: float) -> tuple[int, str]:
    """Return the unit that a time is best written in: its seconds and its name."""
    return next((each for each in UNITS if seconds >= 2 * each[0]), UNITS[-1])


def _title(status: Status) -> Text:
    return plain(f"{status.search}: {status.model}, {status.rate:.0%} removed", "bold", no_wrap=True)


def _facts(status: Status, per_minute: float | None = None) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    pace = "" if per_minute is None else f"; {per_minute:.1f} per minute"
    table.add_row("state", _state(status))
    if status.preparing:
        table.add_row("step", plain(_step(status.preparing)))
    parents = SOURCE_NAMES[status.parents_source] if status.parents_source else "–"
    table.add_row("round", f"{status.round}, parents chosen by {parents}")
    stopped = f", {status.stopped} stopped early" if status.stopped else ""
    table.add_row("candidates", f"{status.measured} measured, {status.failed} failed{stopped}{pace}")
    made = [f"{SOURCE_NAMES.get(name, name)} {count}" for name, count in status.by_source.items()]
    table.add_row("made by", ", ".join(made))
    table.add_row("queue", f"{status.queue.queued} queued, {status.queue.running} running")
    table.add_row("kl" if status.fitness == "kl" else "perplexity", status.figures.in_words())
    if status.fitness == "kl":
        perplexity = Figures("perplexity", status.best_perplexity, status.uniform_perplexity, status.dense_perplexity)
        table.add_row("perplexity", perplexity.in_words())
    table.add_row("tokens", f"{status.tokens.get('prompt', 0):,} in, {status.tokens.get('completion', 0):,} out")
    table.add_row("time", f"{status.seconds:,.0f} s")
    return table


def _step(worker: WorkerStatus) -> str:
    """Return what a worker does before it can measure, and about how long this step still takes."""
    step = worker.stage + (f", {worker.done:,} of {worker.total:,}" if worker.total else "")
    if not worker.seconds_left:
        return step
    size, unit = unit_of_time(worker.seconds_left)
    return f"{step}; about {worker.seconds_left / size:.0f} {unit} left in this step"


def in_words(event: Event) -> str:
    """Return an event as one line, without what is the same in most lines."""
    fields = {name: value for name, value in event.fields.items() if value is not None}
    if fields.get("text") == "fitness":
        del fields["text"]
    words = (_short(value) if name == "candidate" else f"{name}={_short(value)}" for name, value in fields.items())
    return f"{event.name.replace('_', ' ')}  {' '.join(words)}"


def _state(status: Status) -> Text:
    if status.redis == "away":
        return Text("Redis does not answer; this is the last known status", "red")
    if status.daemon is None:
        return Text("finished" if status.finished else "stopped", "green" if status.finished else "yellow")
    if status.control == "pause" and (status.queue.running or any(w.stage == "evaluating" for w in status.workers)):
        return Text("pausing; the evaluation in progress will complete", "yellow")
    if status.control == "pause" and status.preparing:
        return Text("paused; the model is still being prepared", "yellow")
    if status.control != "run":
        return Text({"pause": "paused", "stop": "stopping"}[status.control], "yellow")
    if status.degraded:
        why = "the LLM budget is used up" if status.degraded_by == "budget" else "no LLM endpoint answers"
        return Text(f"degraded: {why}; operators without an LLM propose", "yellow")
    if status.awaited:
        until = status.awaited.until
        left = "" if until is None else f", {max(0.0, (until - datetime.now(UTC)).total_seconds()):,.0f} s left"
        return Text(f"waiting for the LLM{left} ({status.awaited.reason})", "yellow")
    if status.preparing:
        return Text("preparing the model", "green")
    return Text("running" if status.workers else "waiting for a worker", "green" if status.workers else "yellow")


def _members(status: Status, members: Sequence[Evaluation]) -> Table:
    table = Table(title="best candidates", box=None, title_justify="left")
    for column in ("rank", "id", "kl" if status.fitness == "kl" else "perplexity", "agent", "source", "round"):
        table.add_column(column, justify="right" if column in ("rank", "perplexity", "kl", "round") else "left")
    for rank, member in enumerate(members, start=1):
        if isinstance(member.outcome, Measured):
            who = member.candidate.provenance
            fitness = f"{member.outcome.fitness:,.4f}"
            table.add_row(
                str(rank), plain(member.candidate.id), fitness, who.agent, SOURCE_NAMES[who.source], str(who.round)
            )
    return table


def _workers(status: Status, most: int | None = None) -> Table:
    """Return the table of workers, of which at most `most` are shown."""
    shown, workers = status.workers[:most], len(status.workers)
    title = "workers" if len(shown) == workers else f"{len(shown)} of {workers:,} workers"
    table = Table(title=title, box=None, title_justify="left")
    for column in ("worker", "doing", "measured"):
        table.add_column(column, justify="right" if column == "measured" else "left")
    for worker in shown:
        share = f" {worker.done}/{worker.total}" if worker.total and not worker.is_ready else ""
        doing = plain(f"{worker.stage}{share} {worker.detail}".strip())
        table.add_row(plain(worker.consumer), doing, str(worker.measured))
    return table


def _endpoints(status: Status) -> RenderableType:
    table = Table(title="LLM endpoints", box=None, title_justify="left")
    for column in ("endpoint", "state", "requests", "errors"):
        table.add_column(column, justify="left" if column in ("endpoint", "state") else "right")
    for name, endpoint in status.endpoints.items():
        state = plain(endpoint.shown_state + (f": {endpoint.reason}" if endpoint.reason else ""))
        table.add_row(plain(name), state, f"{endpoint.requests:,}", f"{endpoint.errors:,}")
    return table


def _dead(status: Status) -> RenderableType:
    table = Table(title=f"failed jobs (last {len(status.dead)})", box=None, title_justify="left")
    for column in ("id", "worker", "why"):
        table.add_column(column)
    for job in status.dead[:SHOWN_MEMBERS]:
        why = job.get("detail") or job.get("reason", "")
        table.add_row(*(plain(text) for text in (job.get("id", ""), job.get("worker", ""), why)))
    return table


def _cropped(table: Table) -> Table:
    """Return the table with each row on one line, which ends in an ellipsis where it is too long."""
    for column in table.columns:
        column.no_wrap = True
    return table


def plain(text: str, style: str = "", *, no_wrap: bool = False) -> Text:
    """Return text from Redis without markup and without control characters."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return Text(shown, style, no_wrap=no_wrap or None, overflow="ellipsis" if no_wrap else None)


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
