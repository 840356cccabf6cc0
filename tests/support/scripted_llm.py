"""A scripted OpenAI-compatible endpoint on a free loopback port, which records what it was asked.

Give it one `Reply` (or handler) per call; after the last, the last goes on. Or give one function of the request body,
so that it answers each question on its merits.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

from agents.llm.endpoint import Endpoint

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Says = Callable[[dict[str, Any]], str | Handler]
"""Maps the body of a request to the text of the model's answer, or to another behaviour."""


@dataclass(frozen=True)
class Reply:
    """The raw response to one call."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"

    async def __call__(self, _request: web.Request) -> web.StreamResponse:
        return web.Response(
            body=self.body, status=self.status, headers=dict(self.headers), content_type=self.content_type
        )


def says(
    text: str | None, *, finish_reason: str = "stop", prompt_tokens: int = 10, completion_tokens: int = 5, **more: Any
) -> Reply:
    """Return a complete completion; `more` is added to its message."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text, **more}}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return as_json({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage})


def as_json(value: object, status: int = 200) -> Reply:
    """Any JSON."""
    return Reply(json.dumps(value).encode(), status)


def refuses(status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> Reply:
    """Return an error in OpenAI's format."""
    body = {"error": {"message": message, "type": "error", "code": code}}
    return Reply(json.dumps(body).encode(), status, headers or {})


def lists_models(*names: str) -> Reply:
    """The models that an endpoint has."""
    return as_json({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


async def drips(request: web.Request) -> web.StreamResponse:
    """Send headers at once, then a blank every 20 ms forever, so that no read times out."""
    response = await _begin(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.02)


async def never_ends(request: web.Request) -> web.StreamResponse:
    """Send a body as fast as possible."""
    response = await _begin(request)
    while True:
        await response.write(b" " * 65536)


async def breaks_off(request: web.Request) -> web.StreamResponse:
    """Send half a body and close the connection."""
    response = await _begin(request, content_length=1000)
    await response.write(b'{"choices": [')
    assert request.transport is not None
    request.transport.abort()
    return response


async def hangs(_request: web.Request) -> web.StreamResponse:
    """Do not answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def _begin(request: web.Request, content_length: int | None = None) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_type = "application/json"
    response.content_length = content_length
    await response.prepare(request)
    return response


@dataclass(frozen=True)
class Asked:
    """One received request for a completion."""

    headers: Mapping[str, str]
    body: dict[str, Any]
    moment: float
    """Time of arrival on the monotonic clock."""


class ScriptedLlm:
    """An async context manager; `asked` holds every request for a completion."""

    def __init__(
        self,
        script: Sequence[Handler] | Says = (),
        *,
        name: str = "fake",
        models: Sequence[Handler] | None = None,
        port: int = 0,
    ) -> None:
        self.name = name
        self.asked: list[Asked] = []
        self.other_paths: list[str] = []
        self.readiness_checks = 0
        self.port = port
        self.script = script
        self._models = models if models is not None else [lists_models("model", "scripted", "m")]

    async def __aenter__(self) -> Self:
        application = web.Application(client_max_size=64 * 1024 * 1024)
        application.router.add_post("/v1/chat/completions", self._complete)
        application.router.add_get("/v1/models", self._list_models)
        application.router.add_route("*", "/{path:.*}", self._elsewhere)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def endpoint(self) -> Endpoint:
        """This endpoint, without a key."""
        return Endpoint(self.name, self.base_url, "model")

    @property
    def settings(self) -> dict[str, str]:
        """The settings of this endpoint."""
        return {"base_url": self.base_url, "model": "scripted"}

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [asked.body for asked in self.asked]

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(Asked(dict(request.headers), body, time.monotonic()))
        if callable(self.script):
            answer = self.script(body)
            return await (says(answer) if isinstance(answer, str) else answer)(request)
        handler = self.script[min(len(self.asked), len(self.script)) - 1]
        return await handler(request)

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        self.readiness_checks += 1
        handler = self._models[min(self.readiness_checks, len(self._models)) - 1]
        return await handler(request)

    async def _elsewhere(self, request: web.Request) -> web.StreamResponse:
        self.other_paths.append(request.path)
        return await says("from elsewhere")(request)
