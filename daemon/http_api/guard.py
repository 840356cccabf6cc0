"""Checks of every request to the HTTP API (host, origin, token, size), as middlewares, outermost first.

Every error is one JSON object with one sentence, never a traceback. A request must use a known host name (against DNS
rebinding), must not come from another site's page, and must carry the token. Writes are small JSON bodies. There is no
CORS and no cookie, so a browser sends no credentials by itself.
"""

import asyncio
import hmac
import re
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from daemon.http_api.token import Access

MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
FAILURES_PER_MINUTE = 10
ADDRESSES_REMEMBERED = 1000
OPEN_TO_ALL = frozenset({"/livez", "/", "/page.css", "/page.js", "/page.svg"})
"""Paths that need no token: they tell nothing of the search."""

_KEPT_HEADERS = ("Allow", "Retry-After", "WWW-Authenticate")
_READS = frozenset({"GET", "HEAD"})
_HEADERS = {
    "Server": "selfpruner",
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_HOST = re.compile(r"(\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\s\[\]:@/?#\\]+))(:[0-9]*)?")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Check = Callable[[web.Request], Awaitable[None]]

log = structlog.get_logger()


class Guard:
    """The checks of one server; `host` is the address it listens on, `allowed_hosts` are its other names."""

    def __init__(self, access: Access, host: str, allowed_hosts: Iterable[str] = ()) -> None:
        self._token = access.token.get_secret_value().encode() if access.token else None
        self._hosts = {"localhost", "127.0.0.1", "::1", *(name.lower().strip("[]") for name in (host, *allowed_hosts))}
        self._failures = Failures()

    def application(self) -> web.Application:
        """Return an application without routes that checks requests and adds the security headers."""
        checks = (self._check_host, self._check_origin, self._check_token, check_body)
        middlewares = [errors_as_json, *(as_middleware(check) for check in checks)]
        application = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
        application.on_response_prepare.append(_prepare)
        return application

    async def _check_host(self, request: web.Request) -> None:
        """Raise 403 unless the request names this server in its only Host header, and in its URL if a host is there."""
        hosts = request.headers.getall("Host", [])
        named = len(hosts) == 1 and host_name(hosts[0]) in self._hosts
        if not named or (_is_absolute(request.raw_path) and host_name(_place(request.raw_path)) not in self._hosts):
            raise web.HTTPForbidden(text="unknown host name; add it to http.allowed_hosts")

    async def _check_origin(self, request: web.Request) -> None:
        """Raise 403 for requests from another site's page, except for a followed link, whose reply no script sees."""
        origin = request.headers.get("Origin")
        if origin is not None and _place(origin) != request.headers["Host"].lower():
            raise web.HTTPForbidden(text="requests from pages of another origin are refused")
        follows_link = request.method in _READS and request.headers.get("Sec-Fetch-Mode") == "navigate"
        if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and not follows_link:
            raise web.HTTPForbidden(text="requests from pages of another site are refused")

    async def _check_token(self, request: web.Request) -> None:
        """Raise 401 without the right token, and 429 for an address with many failures. The right token always passes.

        Otherwise anyone with the owner's address, for example behind the same proxy, could lock out the owner. The
        limit is not needed against guessing, because a token has at least 16 characters.
        """
        if self._token is None or request.path in OPEN_TO_ALL:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(_bytes(given.strip()), self._token):
            return
        wait = self._failures.count(request.remote or "", time.monotonic())
        if wait > 0:
            raise web.HTTPTooManyRequests(
                text="too many requests without the right token", headers={"Retry-After": str(int(wait) + 1)}
            )
        raise web.HTTPUnauthorized(
            text="this needs the header Authorization: Bearer TOKEN", headers={"WWW-Authenticate": "Bearer"}
        )


@dataclass
class _Recent:
    """Requests of one address without the right token."""

    moments: deque[float] = field(default_factory=deque)
    """Times of the 401 replies in the last minute."""
    last: float = 0.0
    logged: bool = False
    """Whether this address was logged; reset after a minute without such requests."""


class Failures:
    """Counts requests without the right token in the last minute, for a bounded number of addresses."""

    def __init__(self) -> None:
        self._recent: OrderedDict[str, _Recent] = OrderedDict()

    def count(self, address: str, now: float) -> float:
        """Count a failure of `address`. Returns the seconds until it is below the limit again, or 0."""
        recent = self._recent.setdefault(address, _Recent())
        self._recent.move_to_end(address)
        if len(self._recent) > ADDRESSES_REMEMBERED:
            self._recent.popitem(last=False)
        recent.logged = recent.logged and now - recent.last < 60
        recent.last = now
        while recent.moments and now - recent.moments[0] >= 60:
            recent.moments.popleft()
        if len(recent.moments) == FAILURES_PER_MINUTE:
            return 60 - (now - recent.moments[0])
        recent.moments.append(now)
        if len(recent.moments) == FAILURES_PER_MINUTE and not recent.logged:
            recent.logged = True
            log.warning("http_token_failures", address=address, count=FAILURES_PER_MINUTE)
        return 0


async def check_body(request: web.Request) -> None:
    """Refuse a write that is not JSON (415), or whose body is too long (413), too slow (408) or undecodable (400)."""
    if request.method in _READS:
        return
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="a request with a body must be of Content-Type application/json")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body did not come within {BODY_SECONDS:g} seconds") from None
    except web.RequestPayloadError:
        raise web.HTTPBadRequest(text="the body is not what its headers say, and cannot be decoded") from None
    except web.HTTPRequestEntityTooLarge as error:
        raise web.HTTPRequestEntityTooLarge(
            MAX_BODY_BYTES, error.status, text=f"a body has at most {MAX_BODY_BYTES} bytes"
        ) from None


def as_middleware(check: Check) -> Any:
    """Return a middleware that runs `check`, which raises an HTTP error to refuse a request."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        await check(request)
        return await handler(request)

    return middleware


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Reply to every error with {"error": sentence}. Unexpected errors are logged, and their text is not sent."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        kept = {name: error.headers[name] for name in _KEPT_HEADERS if name in error.headers}
        return web.json_response({"error": _sentence(error)}, status=error.status, headers=kept)
    except (ConnectionResetError, asyncio.CancelledError):
        raise  # the client has disconnected, or the server stops
    except Exception:
        log.exception("http_request_failed", path=request.path)
        return web.json_response({"error": "the server failed to answer this; its log says why"}, status=500)


async def _prepare(_request: web.Request, response: web.StreamResponse) -> None:
    add_headers(response)


def add_headers(response: web.StreamResponse) -> None:
    """Add the headers that every reply has."""
    response.headers.update(_HEADERS)


def host_name(host: str) -> str:
    """Return the name in a Host header without its port; empty if the header is malformed."""
    found = _HOST.fullmatch(host.strip().lower())
    return (found["address"] or found["name"].rstrip(".")) if found else ""


def _is_absolute(target: str) -> bool:
    """Whether a request's target contains a host."""
    return not target.startswith("/") and target != "*"


def _place(origin: str) -> str:
    """Return the host and port of an origin or a URL, or an empty string."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _sentence(error: web.HTTPException) -> str:
    if error.status == 404 and error.text == "404: Not Found":
        return "not found"
    if error.status == 405:
        return "this method is not allowed here"
    return str(error.text)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
