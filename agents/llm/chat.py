"""Chat: asks the endpoints in order, within the budget, and reports their state."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Self

import structlog

from agents.llm.client import RequestFailed
from agents.llm.connection import Connection, Gate
from agents.llm.dialect import Rung
from agents.llm.endpoint import Answer, Awaited, Degraded, Endpoint, LlmState, Question, Usage
from agents.llm.policy import BudgetUsedUp, ChatPolicy, Spent
from agents.llm.readiness import Readiness
from protocol.errors import EndpointError

Record = Callable[[dict[str, object]], None]

log = structlog.get_logger()


async def _open_gate() -> None:
    return


def _no_record(_: dict[str, object]) -> None:
    return


class Chat:
    """Asks endpoints in order; an async context manager.

    `gate` is awaited before every HTTP request, so that a pause takes effect. `record` gets every question with its
    answer. `spent` is the part of the budget that earlier processes of this search have used.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        policy: ChatPolicy | None = None,
        *,
        gate: Gate = _open_gate,
        record: Record = _no_record,
        spent: Spent | None = None,
    ) -> None:
        self._policy = policy or ChatPolicy()
        self._connections = [Connection(e, self._policy, gate=gate, permit=self._permit) for e in endpoints]
        self._gate = gate
        self._record = record
        self._spent_before = spent or Spent()
        self._stack = AsyncExitStack()
        self._may_ask = asyncio.Event()
        self._may_ask.set()
        self._awaited: Awaited | None = None
        self._degraded: Degraded | None = None
        self._reason: str | None = None

    async def __aenter__(self) -> Self:
        for connection in self._connections:
            await self._stack.enter_async_context(connection.client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def usage(self) -> dict[str, Usage]:
        """Totals of this process by endpoint name."""
        return {connection.endpoint.name: connection.usage for connection in self._connections}

    @property
    def costs(self) -> dict[str, float]:
        """Cost of this process's tokens by endpoint name, at the endpoint's prices."""
        return {c.endpoint.name: c.usage.spent(c.endpoint).cost for c in self._connections}

    @property
    def contexts(self) -> dict[str, int | None]:
        """Context size in tokens by endpoint name: the configured size, else the size that the endpoint reported."""
        return {connection.endpoint.name: connection.context for connection in self._connections}

    @property
    def forms(self) -> dict[str, Rung]:
        """The strictest form of structured replies that each endpoint has not refused, by endpoint name."""
        return {connection.endpoint.name: connection.form for connection in self._connections}

    @property
    def spent(self) -> Spent:
        """Totals and cost of the search, over all its processes."""
        return sum((c.usage.spent(c.endpoint) for c in self._connections), self._spent_before)

    @property
    def state(self) -> LlmState:
        """Whether the fallback proposes, what is waited for, and the state of each endpoint."""
        return LlmState(
            awaited=self._awaited,
            degraded=self._degraded,
            reason=self._reason,
            endpoints=tuple(c.state for c in self._connections),
        )

    async def ask(self, question: Question) -> Answer:
        """Return the answer of the first endpoint that answers; raise EndpointError if no endpoint does.

        While `wait_ready` waits, the question waits too.
        """
        await self._may_ask.wait()
        try:
            self._permit()
            return await self._ask_in_order(question)
        except BudgetUsedUp as error:
            self._degrade("budget", str(error))
            self._record_result(question, error=str(error))
            raise

    async def wait_ready(
        self,
        waiting: Callable[[str, str], None] = lambda *_: None,
        *,
        at_most: float | None = None,
        refuse: bool = True,
    ) -> None:
        """Wait until any endpoint answers, at most `at_most` seconds.

        If no endpoint answers at first, `waiting` is called once with the endpoints' names and the reason. Raise
        SettingsError if an endpoint refuses our key or does not know our model. With `refuse` False, such an endpoint
        rests instead, as it would after a refusal during the search.
        """
        if self._policy.used_up(self.spent) is not None:
            return
        until = None if at_most is None else datetime.now(UTC) + timedelta(seconds=at_most)

        def note(names: str, why: str) -> None:
            self._awaited = Awaited(reason=f"{names}: {why}", until=until)
            waiting(names, why)

        readiness = Readiness(self._connections, self._policy, gate=self._gate, permit=self._permit)
        self._may_ask.clear()
        try:
            await readiness.wait(note, at_most=at_most, refuse=refuse)
        finally:
            self._awaited = None
            self._may_ask.set()

    async def _ask_in_order(self, question: Question) -> Answer:
        failures: list[str] = []
        alive = False
        for number, connection in enumerate(self._connections):
            others = any(other.is_free for other in self._connections[number + 1 :])
            name = connection.endpoint.name
            started = time.monotonic()
            try:
                answer = await connection.answer(
                    question, patience=self._policy.longest_wait if others else self._policy.deadline_seconds
                )
            except BudgetUsedUp:
                raise
            except EndpointError as error:
                failures.append(f"{name}: {error}")
                if isinstance(error, RequestFailed):
                    alive = alive or error.kind == "question"
                    connection.usage.errors += 1
                    log.info("endpoint_failed", endpoint=name, reason=str(error))
                    self._record_result(question, endpoint=name, error=str(error), seconds=time.monotonic() - started)
                continue
            self._record_result(question, endpoint=name, answer=answer, seconds=answer.seconds)
            self._recover()
            return answer
        why = "no LLM endpoint answered: " + ("; ".join(failures) or "none is configured")
        if not alive:
            self._degrade("endpoints", why)
        self._record_result(question, error=why)
        raise EndpointError(why, retryable=True)

    def _permit(self) -> None:
        """Raise BudgetUsedUp if no more questions may be asked."""
        if limit := self._policy.used_up(self.spent):
            raise BudgetUsedUp(limit)

    def _degrade(self, degraded: Degraded, reason: str) -> None:
        if self._degraded != degraded:
            log.warning("llm_degraded", degraded=degraded, reason=reason)
            self._reason = reason
        self._degraded = degraded

    def _recover(self) -> None:
        if self._degraded:
            log.info("llm_recovered", degraded=self._degraded)
        self._degraded = self._reason = None

    def _record_result(
        self,
        question: Question,
        *,
        endpoint: str | None = None,
        answer: Answer | None = None,
        error: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Record the result of a question at one endpoint, or (`endpoint` None) that no endpoint answered."""
        self._record(
            {
                "time": datetime.now(UTC).isoformat(),
                "label": question.label,
                "endpoint": endpoint,
                "messages": [dict(message) for message in question.messages],
                "schema_name": question.schema_name,
                "seed": question.seed,
                "temperature": question.temperature,
                "max_tokens": question.max_tokens,
                "text": answer.text if answer else None,
                "error": error,
                "finish_reason": answer.finish_reason if answer else None,
                "prompt_tokens": answer.prompt_tokens if answer else 0,
                "completion_tokens": answer.completion_tokens if answer else 0,
                "seconds": seconds,
            }
        )
