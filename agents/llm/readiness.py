"""Readiness checks before a search begins: does an endpoint answer, accept our key and know our model?

Many servers list their models under `GET /v1/models`. But some list no model, and some list their only model under
another name and accept any name. If our model is not listed, one question with a limit of one token decides, and only
an explicit refusal counts.
"""

import asyncio
from collections.abc import Callable, Sequence

from agents.llm.client import RequestFailed
from agents.llm.connection import Connection, Gate, Permit
from agents.llm.policy import ChatPolicy
from protocol.errors import EndpointError, SettingsError

NAMED = 8
"""Maximum number of models that an error names."""
LONGEST_SHOWN_NAME = 100
"""Maximum number of characters that are shown of each name."""
_LOADING = (429, 502, 503, 504)


class Readiness:
    """Checks endpoints repeatedly until one answers."""

    def __init__(self, connections: Sequence[Connection], policy: ChatPolicy, *, gate: Gate, permit: Permit) -> None:
        self._connections = connections
        self._policy = policy
        self._gate = gate
        self._permit = permit
        self._why: dict[str, str] = {}
        """Why each endpoint did not answer, by its name."""

    async def wait(self, waiting: Callable[[str, str], None], *, at_most: float | None, refuse: bool) -> None:
        """Wait until any endpoint answers, at most `at_most` seconds; raise SettingsError (see Chat.wait_ready)."""
        pause, announced = self._policy.first_wait, False
        loop = asyncio.get_running_loop()
        end = None if at_most is None else loop.time() + at_most
        left = self._connections
        while left := await self._without_answer(left, refuse=refuse):
            if not announced:
                names = [connection.endpoint.name for connection in left]
                reasons = dict.fromkeys(self._why.get(name, "no answer") for name in names)
                waiting(", ".join(names), "; ".join(reasons))
                announced = True
            if end is not None and loop.time() >= end:
                return
            await asyncio.sleep(pause if end is None else min(pause, max(0.0, end - loop.time())))
            pause = min(2 * pause, self._policy.longest_wait)

    async def _without_answer(self, left: Sequence[Connection], *, refuse: bool) -> Sequence[Connection]:
        """Return the connections to wait for; empty if an endpoint has answered, or if all have refused and rest."""
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
        """Return whether the endpoint answers; if it refuses all our questions, return the reason as a sentence."""
        try:
            async with asyncio.timeout(self._policy.connect_timeout):
                models = await connection.client.models()
        except RequestFailed as error:
            if error.status is None or error.status in _LOADING:
                self._why[connection.endpoint.name] = str(error)
                return False
            if error.status in (401, 403):
                return self._refusal_of_key(connection, error)
            models = {}
        except TimeoutError:
            self._why[connection.endpoint.name] = f"no answer within {self._policy.connect_timeout:g} s"
            return False
        is_listed = connection.endpoint.model in models
        if connection.context is None:
            only = next(iter(models.values())) if len(models) == 1 else None  # it may be ours under another name
            connection.context = models.get(connection.endpoint.model, only)
        return is_listed or await self._try(connection, list(models)) or True

    async def _try(self, connection: Connection, names: Sequence[str]) -> str | None:
        """Ask for one token; return the reason if the endpoint refuses all our questions, else None."""
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
            pass  # a model that is loaded at the first question takes time
        return None

    def _refusal_of_key(self, connection: Connection, error: RequestFailed) -> str:
        advice = "set api_key_file or api_key in llm.endpoints"
        if connection.endpoint.api_key is not None:
            advice = "api_key_file or api_key in llm.endpoints is wrong, or for another endpoint"
        return f"the LLM endpoint {connection.endpoint.name!r} refuses the key ({error.status}): {advice}"
