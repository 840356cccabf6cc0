"""Whether endpoints can be asked before a search begins: do they answer, take our key and know our model?

Many servers list the models they have, under `GET /v1/models`; but some list none, some list their only model under
another name and take any. So the list alone decides nothing: where our model is not on it, one question of one token
does, and only a refusal that says so counts.
"""

import asyncio
from collections.abc import Callable, Sequence

from agents.llm.client import RequestFailed
from agents.llm.connection import Connection, Gate, Permit
from agents.llm.endpoint import ChatPolicy
from protocol.errors import EndpointError, SettingsError

NAMED = 8
"""The most models that a refusal names."""
LONGEST_SHOWN_NAME = 100
"""Characters of each."""
_LOADING = (429, 502, 503, 504)


class Readiness:
    """Checks endpoints until one can be asked."""

    def __init__(self, connections: Sequence[Connection], policy: ChatPolicy, *, gate: Gate, permit: Permit) -> None:
        self._connections = connections
        self._policy = policy
        self._gate = gate
        self._permit = permit

    async def wait(self, waiting: Callable[[str], None], *, at_most: float | None, refuse: bool) -> None:
        """Return when any endpoint answers, or after `at_most` seconds; raises SettingsError (see Chat.wait_ready)."""
        pause, told = self._policy.first_wait, False
        loop = asyncio.get_running_loop()
        end = None if at_most is None else loop.time() + at_most
        left = self._connections
        while left := await self._without_answer(left, refuse=refuse):
            if end is not None and loop.time() >= end:
                return
            if not told:
                waiting(", ".join(connection.endpoint.name for connection in left))
                told = True
            await asyncio.sleep(pause if end is None else min(pause, max(0.0, end - loop.time())))
            pause = min(2 * pause, self._policy.longest_wait)

    async def _without_answer(self, left: Sequence[Connection], *, refuse: bool) -> Sequence[Connection]:
        """Return those that may still answer; none where one has, or where all have refused and rest."""
        checks = await asyncio.gather(*(self._check(connection) for connection in left))
        for connection, check in zip(left, checks, strict=True):
            if isinstance(check, str):
                if refuse:
                    raise SettingsError(check)
                connection.rest(check)
        if True in checks:
            return ()
        return [connection for connection, check in zip(left, checks, strict=True) if check is False]

    async def _check(self, connection: Connection) -> bool | str:
        """Whether it answers; in words, why it will take none of our questions."""
        try:
            async with asyncio.timeout(self._policy.connect_timeout):
                models = await connection.client.models()
        except RequestFailed as error:
            if error.status is None or error.status in _LOADING:
                return False
            if error.status in (401, 403):
                return self._refusal_of_key(connection, error)
            models = {}
        except TimeoutError:
            return False
        is_listed = connection.endpoint.model in models
        if connection.context is None:
            only = next(iter(models.values())) if len(models) == 1 else None  # it may be listed under another name
            connection.context = models.get(connection.endpoint.model, only)
        return is_listed or await self._try(connection, list(models)) or True

    async def _try(self, connection: Connection, names: Sequence[str]) -> str | None:
        """Ask for one token; why the endpoint would take no question, where that is what it says."""
        await self._gate()
        try:
            self._permit()
            connection.usage.requests += 1
            async with asyncio.timeout(self._policy.connect_timeout):
                await connection.client.complete([{"role": "user", "content": "Say yes."}], {"max_tokens": 1}, 1)
        except RequestFailed as error:
            if error.unknown_model:
                shown = [connection.client.masking.shown(name)[:LONGEST_SHOWN_NAME] for name in names[:NAMED]]
                known = f"; it knows {', '.join(shown)}" if names else ""
                more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
                return (
                    f"the LLM endpoint {connection.endpoint.name!r} does not know the model "
                    f"{connection.endpoint.model!r} of llm.endpoints{known}{more}"
                )
            if error.status in (401, 403):
                return self._refusal_of_key(connection, error)
            if error.status in (404, 405):
                return (
                    f"the LLM endpoint {connection.endpoint.name!r} answers {error.status} to a question: "
                    "base_url in llm.endpoints must end in /v1, or wherever its chat/completions is"
                )
        except (TimeoutError, EndpointError):
            pass  # a model that is loaded when it is first asked takes its time
        return None

    def _refusal_of_key(self, connection: Connection, error: RequestFailed) -> str:
        return (
            f"the LLM endpoint {connection.endpoint.name!r} refuses the key ({error.status}): "
            "set api_key_file or api_key in llm.endpoints"
        )
