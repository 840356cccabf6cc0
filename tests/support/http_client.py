"""The HTTP API of a search for tests, on a free loopback port, and a client with or without its token."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from pydantic import SecretStr
from redis.asyncio import Redis

from daemon.http_api.api import HttpApi
from daemon.http_api.token import Access
from daemon.monitor.observer import Observer
from daemon.settings.service import HttpSettings
from protocol.queue.keys import Keys
from tests.support.samples import SPEC

TOKEN = "a-token-that-tests-bear"


class Asked:
    """A client of one API, with `token`."""

    def __init__(self, api: HttpApi, url: str, session: aiohttp.ClientSession, token: str | None = TOKEN) -> None:
        self.api, self.url, self.session, self.token = api, url, session, token

    async def __call__(
        self, path: str, method: str = "GET", *, token: str | None = "", **more: Any
    ) -> tuple[int, dict[str, Any]]:
        """The status and the JSON of a reply."""
        async with self.request(path, method, token=token, **more) as response:
            return response.status, await response.json()

    def request(
        self,
        path: str,
        method: str = "GET",
        *,
        token: str | None = "",
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> Any:
        """Send a request, without a token if `token` is None."""
        bears = self.token if token == "" else token
        own = {"Authorization": f"Bearer {bears}"} if bears else {}
        return self.session.request(method, self.url + path, headers={**own, **(headers or {})}, **more)


@asynccontextmanager
async def served(
    observer: Observer, *, token: str | None = TOKEN, settings: HttpSettings | None = None
) -> AsyncIterator[Asked]:
    """The API of `observer`, until the block ends."""
    access = Access(SecretStr(token) if token else None)
    api = HttpApi(settings or HttpSettings(port=0), access, observer, free_port=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as session, api.serving() as url:
        yield Asked(api, url, session, token)


def nothing_yet(folder: Path) -> Observer:
    """The observer of a search that waits for a server."""
    redis = Redis.from_url(f"unix://{folder}/nowhere.sock")
    return Observer(redis, Keys("test"), SPEC, folder)
