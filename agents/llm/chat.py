"""Asks the LLM: endpoints in order, within the budget; and says what state they are in."""

import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Self

import structlog

from agents.llm.budget import Budget, BudgetUsedUp, Spent
from agents.llm.client import RequestFailed
from agents.llm.connection import Connection, Gate
from agents.llm.endpoint import Answer, ChatPolicy, Degraded, Endpoint, LlmState, Message, Question, Usage
from agents.llm.readiness import Readiness
from protocol.errors import EndpointError

__all__ = ["Answer", "Chat", "ChatPolicy", "Endpoint", "Usage"]

Record = Callable[[dict[str, object]], None]

log = structlog.get_logger()


async def _open_gate() -> None:
    return


def _no_record(_: dict[str, object]) -> None:
    return


class Chat:
    """Asks endpoints in order; an async context manager.

    `gate` is awaited before every HTTP request, so that a pause holds; `record` gets every question with its answer.
    `spent` is what earlier processes of this search have spent of the `budget`.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        policy: ChatPolicy | None = None,
        *,
        gate: Gate = _open_gate,
        record: Record = _no_record,
        budget: Budget | None = None,
        spent: Spent | None = None,
    ) -> None:
        self._policy = policy or ChatPolicy()
        self._connections = [Connection(e, self._policy, gate=gate, permit=self._permit) for e in endpoints]
        self._gate = gate
        self._record = record
        self._budget = budget or Budget()
        self._spent_before = spent or Spent()
        self._stack = AsyncExitStack()
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
    def contexts(self) -> dict[str, int | None]:
        """Tokens of each endpoint's context by its name: as was given, else as it says itself once it is ready."""
        return {connection.endpoint.name: connection.context for connection in self._connections}

    @property
    def spent(self) -> Spent:
        """What the search has spent, over all its processes."""
        return sum((c.usage.spent(c.endpoint) for c in self._connections), self._spent_before)

    @property
    def state(self) -> LlmState:
        """Whether the classical operators stand in, and how each endpoint is."""
        return LlmState(
            degraded=self._degraded, reason=self._reason, endpoints=tuple(c.state for c in self._connections)
        )

    async def ask(
        self,
        messages: Sequence[Message],
        *,
        schema: dict[str, object] | None,
        schema_name: str,
        seed: int,
        temperature: float,
        max_tokens: int,
        label: str = "",
    ) -> Answer:
        """The answer of the first endpoint that gives one; raises EndpointError when none does."""
        question = Question(messages, schema, schema_name, seed, temperature, max_tokens)
        try:
            self._permit()
            return await self._ask_in_order(question, label)
        except BudgetUsedUp as error:
            self._fallbacks("budget", str(error))
            self._keep(question, label, error=str(error))
            raise

    async def wait_ready(
        self, waiting: Callable[[str], None] = lambda _: None, *, at_most: float | None = None, refuse: bool = True
    ) -> None:
        """Return when any endpoint answers, or after `at_most` seconds.

        `waiting` gets their names, once, if none answers at first. An endpoint that refuses our key or does not know
        our model raises SettingsError; with `refuse` False it rests, as one that refuses later does.
        """
        if self._budget.used_up(self.spent) is None:
            readiness = Readiness(self._connections, self._policy, gate=self._gate, permit=self._permit)
            await readiness.wait(waiting, at_most=at_most, refuse=refuse)

    async def _ask_in_order(self, question: Question, label: str) -> Answer:
        failures: list[str] = []
        alive = False
        for number, connection in enumerate(self._connections):
            others = any(other.is_free for other in self._connections[number + 1 :])
            name = connection.endpoint.name
            started = time.monotonic()
            try:
                answer = await connection.answer(
                    question, patience=self._policy.longest_wait if others else self._policy.deadline
                )
            except BudgetUsedUp:
                raise
            except EndpointError as error:
                failures.append(f"{name}: {error}")
                if isinstance(error, RequestFailed):
                    alive = alive or error.kind == "question"
                    connection.usage.errors += 1
                    log.info("endpoint_failed", endpoint=name, reason=str(error))
                    self._keep(question, label, endpoint=name, error=str(error), seconds=time.monotonic() - started)
                continue
            self._keep(question, label, endpoint=name, answer=answer, seconds=answer.seconds)
            self._llm_answers()
            return answer
        why = "no LLM endpoint answered: " + ("; ".join(failures) or "none is configured")
        if not alive:
            self._fallbacks("endpoints", why)
        self._keep(question, label, error=why)
        raise EndpointError(why, retryable=True)

    def _permit(self) -> None:
        """Raise BudgetUsedUp where nothing more may be asked."""
        if what := self._budget.used_up(self.spent):
            raise BudgetUsedUp(what)

    def _fallbacks(self, degraded: Degraded, reason: str) -> None:
        if self._degraded != degraded:
            log.warning("llm_degraded", degraded=degraded, reason=reason)
            self._reason = reason
        self._degraded = degraded

    def _llm_answers(self) -> None:
        if self._degraded:
            log.info("llm_recovered", degraded=self._degraded)
        self._degraded = self._reason = None

    def _keep(
        self,
        question: Question,
        label: str,
        *,
        endpoint: str | None = None,
        answer: Answer | None = None,
        error: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Record what came of a question: from one endpoint, or (`endpoint` None) that none answered."""
        self._record(
            {
                "time": datetime.now(UTC).isoformat(),
                "label": label,
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
