"""One endpoint: its slots, its cooldown, its circuit breaker, and the one retry policy."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog
import tenacity

from agents.llm.breaker import Breaker, Cooldown
from agents.llm.client import Client, RequestFailed
from agents.llm.dialect import Dialect, Rung
from agents.llm.endpoint import Answer, Endpoint, EndpointState, Question, Usage
from agents.llm.policy import ChatPolicy
from agents.llm.responses import LONGEST_REPLY, Completion
from protocol.errors import EndpointError

Gate = Callable[[], Awaitable[None]]
Permit = Callable[[], None]

VERDICT_POLL_SECONDS = 0.25
"""A question that waits for the result of a probe looks at the gate again after this time."""

log = structlog.get_logger()


class NotAsked(EndpointError):  # noqa: N818  (no request failed)
    """No request was sent: the endpoint rests after failures, is being probed, or demands too long a wait."""

    def __init__(self, why: str) -> None:
        super().__init__(f"no question sent: {why}", retryable=False)


class Connection:
    """Asks one endpoint; an async context manager.

    `gate` waits while the search is paused. It is awaited before a question is admitted and before each HTTP request.
    `permit` is called right before each request, and raises EndpointError if the LLM's budget is used up.
    """

    def __init__(self, endpoint: Endpoint, policy: ChatPolicy, *, gate: Gate, permit: Permit) -> None:
        self.endpoint = endpoint
        self.context = endpoint.context
        self.usage = Usage()
        self.client = Client(endpoint, policy)
        self._policy = policy
        self._gate = gate
        self._permit = permit
        self._dialect = Dialect(rung="grammar" if endpoint.grammar else "json_schema")
        self._slots = asyncio.Semaphore(policy.concurrency)
        self._cooldown = Cooldown()
        self._breaker = Breaker(policy.failures_to_open, policy.rest_seconds, policy.longest_rest)
        self._verdict = asyncio.Event()
        """Set while no probe is in progress."""
        self._verdict.set()
        self._last_failure: str | None = None

    @property
    def state(self) -> EndpointState:
        """The state of the endpoint's breaker, as shown to users."""
        reason = None if self._breaker.state == "closed" else self._last_failure
        return EndpointState(name=self.endpoint.name, state=self._breaker.state, reason=reason)

    @property
    def form(self) -> Rung:
        """The strictest form of structured replies that the endpoint has not refused."""
        return self._dialect.rung

    @property
    def is_free(self) -> bool:
        """Whether a question would be asked at once if a slot is free."""
        return self._breaker.admits and not self._cooldown.left

    def rest(self, why: str, *, at_once: bool = True) -> None:
        """Count a failure. A rest begins after too many failures in a row, or now if `at_once`, and is logged once."""
        self._last_failure = why
        was_closed = self._breaker.state == "closed"
        if self._breaker.failed(at_once=at_once) and was_closed:
            rests = round(self._breaker.rest_left, 1)
            log.warning("endpoint_down", endpoint=self.endpoint.name, reason=why, rests_s=rests)

    async def answer(self, question: Question, *, patience: float) -> Answer:
        """Return one answer, within the number of attempts that the policy allows; raise EndpointError.

        `patience` is the maximum time in seconds to wait if the endpoint asks for a wait or is being probed.
        """
        async with self._slots, self._admission(patience) as probe:
            started = time.monotonic()
            completion = await self._within_deadline(question, patience, 1 if probe else self._policy.attempts)
        return self._answer(completion, time.monotonic() - started)

    @asynccontextmanager
    async def _admission(self, patience: float) -> AsyncIterator[bool]:
        """Wait at the gate, check the breaker, and yield whether this question is the probe. Raises NotAsked.

        While one question probes the endpoint, the others wait for its result.
        """
        await self._gate()
        if not self._verdict.is_set() and not await self._judged_within(min(patience, self._policy.longest_wait)):
            raise NotAsked("another question is probing it")
        if not self._breaker.admits:
            raise NotAsked(f"it rests for {self._breaker.rest_left:.0f} s after: {self._last_failure}")
        if not self._breaker.enter():
            yield False
            return
        self._verdict.clear()
        try:
            yield True
        finally:
            self._breaker.abandoned()  # changes nothing if the probe had a result
            self._verdict.set()

    async def _judged_within(self, seconds: float) -> bool:
        """Return whether the probe ends within `seconds`, of which those at a closed gate do not count."""
        verdict = asyncio.ensure_future(self._verdict.wait())
        try:
            while seconds > 0 and not verdict.done():
                await self._gate()
                await asyncio.wait({verdict}, timeout=min(seconds, VERDICT_POLL_SECONDS))
                seconds -= VERDICT_POLL_SECONDS
            return verdict.done()
        finally:
            verdict.cancel()

    async def _within_deadline(self, question: Question, patience: float, attempts: int) -> Completion:
        try:
            async with asyncio.timeout(self._policy.deadline_seconds) as clock:
                retrying = self._retrying(clock, patience, attempts)
                completion: Completion = await retrying(self._attempt, question, clock, patience)
                return completion
        except TimeoutError:
            why = f"no whole answer within {self._policy.deadline_seconds:g} s"
            self._failed(RequestFailed(why, "unreachable"))
            raise RequestFailed(why, "unreachable") from None

    def _retrying(self, clock: asyncio.Timeout, patience: float, attempts: int) -> tenacity.AsyncRetrying:
        """Return the one retry policy. It begins no wait that would end after the deadline."""
        backoff = tenacity.wait_random_exponential(multiplier=self._policy.first_wait, max=self._policy.longest_wait)

        def wait(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            seconds = backoff(state)
            if isinstance(error, RequestFailed) and error.kind == "limited" and error.wait is None:
                self._cool_down(seconds, error)
            return 0.0 if self._cooldown.left else seconds  # `_wait_turn` waits for the shared cooldown

        def stop(state: tenacity.RetryCallState) -> bool:
            waits = max(state.upcoming_sleep, self._cooldown.left)
            late = _time_left(clock) <= waits or self._cooldown.left > patience
            return state.attempt_number >= attempts or late or self._breaker.state != "closed"

        return tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, RequestFailed) and error.retryable),
            wait=wait,
            stop=stop,
            reraise=True,
        )

    async def _attempt(self, question: Question, clock: asyncio.Timeout, patience: float) -> Completion:
        """Make one attempt.

        If the endpoint refuses a parameter, the question is asked again at once without it, and the refusal does not
        count as a failure. The same applies to a grammar that leads to an empty answer.
        """
        while True:
            await self._wait_turn(clock, patience)
            body = self._dialect.body(question)
            self._permit()
            self.usage.requests += 1
            try:
                completion = await self.client.complete(question.messages, body, question.max_tokens)
            except RequestFailed as error:
                if error.status is None or not self._dialect.learn(error.status, str(error), body):
                    self._failed(error)
                    raise
                log.info("endpoint_dialect", endpoint=self.endpoint.name, rung=self._dialect.rung)
            else:
                self._succeeded()
                if completion.text or not self._dialect.learn_silence(body):
                    return completion
                self._count(completion)
                log.info("endpoint_dialect", endpoint=self.endpoint.name, rung=self._dialect.rung)

    async def _wait_turn(self, clock: asyncio.Timeout, patience: float) -> None:
        """Wait until the cooldown is over. Then wait at the gate, so that the request follows directly.

        Raise NotAsked if the cooldown ends after the deadline or lasts longer than `patience`, or if a rest has begun.
        """
        while wait := self._cooldown.wait():
            if self._cooldown.left > patience or wait >= _time_left(clock):
                raise NotAsked(f"it asked for a wait of {self._cooldown.left:.0f} s")
            await asyncio.sleep(wait)
        await self._pass_gate(clock)
        if self._breaker.state == "open":  # it opened after this question was admitted
            raise NotAsked(f"it rests after: {self._last_failure}")

    async def _pass_gate(self, clock: asyncio.Timeout) -> None:
        """Wait at the gate. This time does not count towards the deadline."""
        left = _time_left(clock)
        clock.reschedule(None)
        await self._gate()
        clock.reschedule(asyncio.get_running_loop().time() + left)

    def _succeeded(self) -> None:
        if self._breaker.succeeded():
            log.info("endpoint_up", endpoint=self.endpoint.name)

    def _failed(self, error: RequestFailed) -> None:
        """Update breaker and cooldown after a failed request.

        An endpoint that asks for a wait, or rejects only this question, counts as reachable. One refusal of key, model
        or quota begins a rest. The endpoint is probed again later, because a gateway may refuse by mistake, and a bill
        may get paid.
        """
        self._last_failure = str(error)
        if error.wait is not None:
            self._cool_down(error.wait, error)
        if error.kind not in ("unreachable", "refused"):
            self._succeeded()
        else:
            self.rest(str(error), at_once=error.kind == "refused")

    def _cool_down(self, seconds: float, error: RequestFailed) -> None:
        if self._cooldown.extend(seconds):
            log.info("endpoint_cools_down", endpoint=self.endpoint.name, seconds=round(seconds, 1), reason=str(error))

    def _count(self, completion: Completion) -> None:
        """Add the tokens of the question and of its completion to the usage."""
        self.usage.prompt_tokens += completion.prompt_tokens
        self.usage.completion_tokens += completion.completion_tokens

    def _answer(self, completion: Completion, seconds: float) -> Answer:
        self._count(completion)
        self.usage.answers += 1
        self.usage.seconds += seconds
        return Answer(
            # Secrets are masked before the text is cut, because a part of a key would not be found. One character
            # above the limit shows that the text was longer.
            text=self.client.masking.masked(completion.text)[: LONGEST_REPLY + 1],
            endpoint=self.endpoint.name,
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            seconds=seconds,
            finish_reason=completion.finish_reason,
        )


def _time_left(clock: asyncio.Timeout) -> float:
    loop = asyncio.get_running_loop()
    return (clock.when() or loop.time()) - loop.time()
