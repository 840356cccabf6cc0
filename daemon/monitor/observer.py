"""Observer: looks at the search of this process once a second, and shows it to others.

It keeps the status and the events for the HTTP API, and writes what only this process knows where others find it: the
condition in Redis, for `selfpruner status` and `watch`; status.json in the folder, for when Redis has gone.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from agents.llm.endpoint import EndpointState, LlmState, Usage
from agents.population.population import Population
from daemon.monitor.event_log import EventLog
from daemon.monitor.events import Follower
from daemon.monitor.heartbeat import Heartbeat
from daemon.monitor.status import AroundReader, Condition, EndpointStatus, Seen, Status
from daemon.search.search import Search
from daemon.state.folder_errors import Trouble
from daemon.state.history import History
from daemon.state.journal import STATUS_FILE, json_text
from protocol.plans.candidate import Candidate
from protocol.plans.spec import SearchSpec
from protocol.queue.connection import is_transient
from protocol.queue.keys import Keys
from protocol.runtime.files import Document

LOOK_SECONDS = 1.0

log = structlog.get_logger()


class Talks(Protocol):
    """What is seen of Chat."""

    @property
    def usage(self) -> Mapping[str, Usage]:
        """Totals by endpoint name."""
        ...

    @property
    def state(self) -> LlmState:
        """Whether the classical operators stand in, and how each endpoint is."""
        ...


class Observer:
    """What can be seen of a search from within. `search`, `chat` and `counters` are filled in as it starts."""

    def __init__(
        self, redis: Redis, keys: Keys, spec: SearchSpec, folder: Path, trouble: Trouble | None = None
    ) -> None:
        self.redis, self.keys, self.spec = redis, keys, spec
        self._trouble = trouble or Trouble(folder)
        # Not durable: the loop, which shows the sign of life, must not wait for a disk; it is written anew in a moment.
        self._file = Document(folder / STATUS_FILE, durable=False)
        self._trouble.watch(STATUS_FILE, lambda: self._file.is_gone)
        self._around = AroundReader(redis, keys)
        self._follower = Follower()
        self._looking = asyncio.Lock()
        self._published: tuple[Condition | None, Status | None] = (None, None)
        self._told = self._begun = False
        self._history = History()
        self._early = Population()
        self.events = EventLog()
        self.heartbeat = Heartbeat()
        self.search: Search | None = None
        self.chat: Talks | None = None
        self.counters: Mapping[str, float] = {}
        self.finished = False

    @property
    def status(self) -> Status | None:
        """As it was at the last look; None before the first one, for which Redis must answer."""
        return self._follower.status

    @property
    def outcomes(self) -> Mapping[tuple[str, str], int]:
        """How many outcomes there are, by source and kind."""
        return self._follower.tally.outcomes

    @property
    def evaluation_seconds(self) -> float:
        """What the workers spent on candidates that were measured."""
        return self._follower.tally.evaluation_seconds

    @property
    def ledger(self) -> dict[str, Candidate]:
        """Every candidate issued."""
        return self.search.state.ledger if self.search else self._history.ledger

    @property
    def population(self) -> Population:
        """Every outcome."""
        return self.search.state.population if self.search else self._early

    def begin(self, history: History) -> None:
        """Show what earlier processes did, until there is a search. To be called once this process is in charge.

        May run in a thread, for a long history takes a second.
        """
        early = Population()
        for id_, outcome in history.outcomes.items():
            early.insert(history.ledger[id_], outcome)
        self._history, self.counters, self._early = history, history.counters, early
        self._begun = True

    async def run(self) -> None:
        """Look once a second until cancelled."""
        while True:
            await self.look()
            if (task := asyncio.current_task()) and task.cancelling():
                return  # the Redis client may lose a cancellation (see RedisRetry)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Bring status and events up to date, and publish what is new; a server that is away is no error."""
        if not self._begun:
            return
        async with self._looking:
            try:
                around = await self._around.read()
            except (RedisError, OSError, TimeoutError) as error:
                self._tell_once(error)
                self.events.add(self._follower.redis_is_away())
                return
            condition = self._condition()
            seen = Seen(
                search=self.keys.search,
                spec=self.spec,
                ledger=self.ledger,
                population=self.population,
                counters=self.counters,
                dense_perplexity=self.search.state.profile.dense.perplexity if self.search else None,
                around=around,
                condition=condition,
            )
            self.events.add(self._follower.look(seen))
            await self._publish(condition)

    def _tell_once(self, error: Exception) -> None:
        """Log what no waiting mends, such as a user who may not read; an outage is logged by those who need Redis."""
        if not is_transient(error) and not self._told:
            log.warning("status_not_read", error=str(error))
            self._told = True

    def _condition(self) -> Condition:
        chat = self.chat
        state = chat.state if chat else LlmState()
        return Condition(
            degraded=state.degraded is not None if chat else None,
            degraded_by=state.degraded,
            parents_source=self.search.parents_source if self.search else None,
            endpoints={e.name: _endpoint(chat.usage[e.name], e) for e in state.endpoints} if chat else {},
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
                pass  # it is tried again at the next look
        is_changed = self._file.is_changed
        if is_changed:
            self._trouble.changed([STATUS_FILE])
        if is_changed or self.status != written:
            record = self.status.model_dump(mode="json") if self.status else {}
            with self._trouble.writing(STATUS_FILE):
                self._file.write(json_text(record))
            written = self.status
        self._published = known, written


def _endpoint(usage: Usage, endpoint: EndpointState) -> EndpointStatus:
    return EndpointStatus(
        state="asked" if endpoint.state == "closed" else "left alone",
        reason=endpoint.reason,
        requests=usage.requests,
        errors=usage.errors,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )
