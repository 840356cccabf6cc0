"""Observer: observes the search of this process twice a second, and publishes its status.

It keeps the status and the events for the HTTP API. It also writes the condition, which only this process knows, to
Redis, for `selfpruner status` and `watch`. In the folder it writes status.json, which can be read without Redis.
"""

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from agents.llm.endpoint import EndpointState, LlmState, Usage
from agents.population.population import Population
from daemon.monitor.event_log import EventLog
from daemon.monitor.events import StatusTracker
from daemon.monitor.heartbeat import Heartbeat
from daemon.monitor.record import SearchRecord
from daemon.monitor.status import Condition, EndpointStatus, Observation, QuestionCounts, RuntimeStateReader, Status
from daemon.search.search import Search
from daemon.state.folder_errors import FolderErrors
from daemon.state.history import History
from daemon.state.journal import STATUS_FILE, json_text
from protocol.plans.candidate import Candidate
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import is_transient
from protocol.queue.keys import Keys
from protocol.runtime.files import AtomicFile

LOOK_SECONDS = 0.5

log = structlog.get_logger()


class ObservedChat(Protocol):
    """The part of Chat that is observed."""

    @property
    def usage(self) -> Mapping[str, Usage]:
        """Total usage by endpoint name."""
        ...

    @property
    def costs(self) -> Mapping[str, float]:
        """Cost by endpoint name."""
        ...

    @property
    def state(self) -> LlmState:
        """Whether operators without an LLM propose, and the state of each endpoint."""
        ...


class Observer:
    """Observes a search in its own process. `search`, `chat` and `counters` are set while the search starts."""

    def __init__(
        self, redis: Redis, keys: Keys, spec: SearchSpec, folder: Path, folder_errors: FolderErrors | None = None
    ) -> None:
        self.redis, self.keys, self.spec, self.folder = redis, keys, spec, folder
        self._folder_errors = folder_errors or FolderErrors(folder)
        # Not durable, because the event loop, which renews the heartbeat, must not wait for a disk. A lost file is
        # soon written again.
        self._file = AtomicFile(folder / STATUS_FILE, durable=False)
        self._folder_errors.watch(STATUS_FILE, lambda: self._file.is_gone)
        self._runtime_state = RuntimeStateReader(redis, keys)
        self._tracker = StatusTracker()
        self._looking = asyncio.Lock()
        self._published: tuple[Condition | None, Status | None] = (None, None)
        self._error_logged = self._begun = False
        self._history = History()
        self._questions: dict[str, Counter[str]] = defaultdict(Counter)
        self.events = EventLog()
        self.heartbeat = Heartbeat()
        self.search: Search | None = None
        self.chat: ObservedChat | None = None
        self.counters: Mapping[str, float] = {}
        self.finished = False

    @property
    def status(self) -> Status | None:
        """The last status; None until Redis has answered once."""
        return self._tracker.status

    @property
    def outcomes(self) -> Mapping[tuple[str, str], int]:
        """Number of outcomes by source and kind."""
        return self._tracker.tally.outcomes

    @property
    def evaluation_seconds(self) -> float:
        """Total time that workers spent on measured candidates."""
        return self._tracker.tally.evaluation_seconds

    @property
    def ledger(self) -> dict[str, Candidate]:
        """Every candidate issued."""
        return self.search.state.ledger if self.search else self._history.ledger

    @property
    def population(self) -> Population:
        """Every outcome."""
        return self.search.state.population if self.search else self._history.population

    @property
    def record(self) -> SearchRecord | None:
        """What reports and charts show, as it is now; None until the model has been measured."""
        if self.search is None:
            return None
        state = self.search.state
        history = History(dict(state.ledger), state.population.copy(), dict(self.counters), dict(state.selections))
        return SearchRecord(self.keys.search, state.spec, state.profile, self.status, history)

    def begin(self, history: History) -> None:
        """Publish the `history` of earlier processes until `search` is set. Call it once this process is in charge."""
        self._history, self.counters = history, history.counters
        self._begun = True

    def count_question(self, record: Mapping[str, object]) -> None:
        """Count one line of the transcript. Its label begins with the agent, and ends with the number of the attempt.

        Not counted is a line of one endpoint without an answer, because the next endpoint is asked the same question,
        and a question that was not sent, because the LLM budget is used up. Drafts have negative numbers, and count as
        questions.
        """
        agent, _, attempt = str(record.get("label", "")).partition(" ")
        is_unanswered = record.get("text") is None
        if is_unanswered and (record.get("endpoint") or (self.chat and self.chat.state.degraded == "budget")):
            return
        counts = self._questions[agent]
        counts["asked_again" if re.search(r" attempt [1-9]\d*$", attempt) else "asked"] += 1
        counts["unanswered"] += is_unanswered

    async def run(self) -> None:
        """Observe twice a second until cancelled."""
        while True:
            await self.look()
            if (task := asyncio.current_task()) and task.cancelling():
                return  # the Redis client may lose a cancellation (see RedisRetry)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Update status and events, and publish changes. An unreachable server is not an error."""
        if not self._begun:
            return
        async with self._looking:
            try:
                runtime = await self._runtime_state.read()
            except (RedisError, OSError, TimeoutError) as error:
                self._log_once(error)
                self.events.add(self._tracker.redis_is_away())
                return
            condition = self._condition()
            observation = Observation(
                search=self.keys.search,
                spec=self.spec,
                ledger=self.ledger,
                population=self.population,
                counters=self.counters,
                profile=self.search.state.profile if self.search else None,
                runtime=runtime,
                condition=condition,
            )
            self.events.add(self._tracker.update(observation))
            await self._publish(condition)

    def _log_once(self, error: Exception) -> None:
        """Log a permanent error once, such as missing permissions. Outages are logged elsewhere."""
        if not is_transient(error) and not self._error_logged:
            log.warning("status_not_read", error=str(error))
            self._error_logged = True

    def _condition(self) -> Condition:
        chat = self.chat
        state = chat.state if chat else LlmState()
        return Condition(
            degraded=state.degraded is not None if chat else None,
            degraded_by=state.degraded,
            awaited=state.awaited,
            parents_source=self.search.parents_source if self.search else None,
            endpoints={e.name: _endpoint(chat, e) for e in state.endpoints} if chat else {},
            questions={agent: QuestionCounts(**counts) for agent, counts in self._questions.items()},
            finished=self.finished,
        )

    async def _publish(self, condition: Condition) -> None:
        known, written = self._published
        if condition != known:
            try:
                async with asyncio.timeout(2):
                    await self.redis.set(self.keys.condition, condition.model_dump_json())
                known = condition
            except (RedisError, OSError, TimeoutError):
                pass  # the next observation tries again
        is_changed = self._file.is_changed
        if is_changed:
            self._folder_errors.changed([STATUS_FILE])
        if is_changed or self.status != written:
            record = self.status.model_dump(mode="json") if self.status else {}
            with self._folder_errors.writing(STATUS_FILE):
                self._file.write(json_text(record))
            written = self.status
        self._published = known, written


def _endpoint(chat: ObservedChat, endpoint: EndpointState) -> EndpointStatus:
    usage = chat.usage[endpoint.name]
    return EndpointStatus(
        state="asked" if endpoint.state == "closed" else "left alone",
        reason=endpoint.reason,
        requests=usage.requests,
        errors=usage.errors,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        answer_seconds=round(usage.seconds / usage.answers, 2) if usage.answers else None,
        cost=round(chat.costs[endpoint.name], 6),
    )
