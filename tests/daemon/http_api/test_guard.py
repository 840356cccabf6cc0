"""Who may ask the HTTP API, and with what: fault by fault, over a real connection. No request gets a traceback."""

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from structlog.testing import capture_logs

from daemon.http_api import guard as http_guard
from daemon.http_api import server as http_server
from daemon.http_api.guard import ADDRESSES_REMEMBERED, FAILURES_PER_MINUTE, Failures
from daemon.http_api.token import Access, open_access
from daemon.monitor.observer import Observer
from daemon.settings.service import HttpSettings
from daemon.settings.sources import load
from protocol.errors import SettingsError
from tests.support.http_client import TOKEN, Asked, served

ROUTES = [
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/api/status"),
    ("GET", "/api/population"),
    ("GET", "/api/candidates/0123456789abcdef"),
    ("GET", "/api/events"),
    ("GET", "/api/control"),
    ("POST", "/api/control"),
    ("GET", "/no/such/path"),
    ("DELETE", "/api/status"),
]


async def raw(url: str, request: bytes) -> bytes:
    """What comes back for these bytes."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    writer.write(request)
    reply = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return reply


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8090", "127.0.0.1.evil.example", "localhost.evil.example", "evil", "[::2]:80"],
)
@pytest.mark.parametrize("path", ["/livez", "/api/population", "/no/such/path"])
async def test_a_foreign_host_is_refused_whatever_it_asks_for(ask: Asked, host: str, path: str) -> None:
    status, body = await ask(path, headers={"Host": host})
    assert status == 403 and "http.allowed_hosts" in body["error"]


@pytest.mark.parametrize("head", [b"", b"Host: 127.0.0.1\r\nHost: evil.example\r\n"])
async def test_a_request_names_its_host_once(ask: Asked, head: bytes) -> None:
    reply = await raw(ask.url, b"GET /livez HTTP/1.1\r\n" + head + b"Connection: close\r\n\r\n")
    assert reply.split()[1] in (b"403", b"400")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8090", "[::1]:8090", "search.example"])
async def test_the_servers_own_names_are_let_in(observer: Observer, host: str) -> None:
    settings = HttpSettings(port=0, allowed_hosts=("Search.example",))
    async with served(observer, settings=settings) as ask:
        assert (await ask("/api/population", headers={"Host": host}))[0] == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "", "http://["]
)
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_page_of_another_origin_is_refused_with_the_token_too(
    ask: Asked, method: str, path: str, origin: str
) -> None:
    status, body = await ask(path, method, headers={"Origin": origin}, json={"command": "stop"})
    assert status == 403 and "origin" in body["error"]


async def test_a_page_of_our_own_origin_is_let_in(ask: Asked) -> None:
    headers = {"Origin": ask.url, "Sec-Fetch-Site": "same-origin"}
    assert (await ask("/api/population", headers=headers))[0] == 200


async def test_what_a_browser_calls_cross_site_is_refused_but_for_following_a_link(ask: Asked) -> None:
    for site in ("cross-site", "same-site"):
        there = {"Sec-Fetch-Site": site}
        assert (await ask("/api/population", headers=there))[0] == 403
        link = {**there, "Sec-Fetch-Mode": "navigate"}
        assert (await ask("/api/population", headers=link))[0] == 200
        assert (await ask("/api/control", "POST", headers=link, json={"command": "stop"}))[0] == 403


async def test_a_web_socket_of_another_origin_is_refused(ask: Asked) -> None:
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await ask.session.ws_connect(ask.url + "/api/events", origin="https://evil.example")
    assert caught.value.status == 403


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", f"Basic {TOKEN}", TOKEN, "Bearer", f"Bearer {TOKEN}x", "Bearer ü"]
)
async def test_without_the_token_every_route_but_livez_is_shut(
    ask: Asked, method: str, path: str, given: str | None
) -> None:
    headers = {} if given is None else {"Authorization": given}
    async with ask.request(path, method, token=None, headers=headers) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert set(await response.json()) == {"error"}
    assert (await ask("/livez", token=None))[0] == 200


async def test_who_keeps_on_without_the_token_is_told_to_wait_and_the_owner_is_not(ask: Asked) -> None:
    statuses = [(await ask("/api/population", token="guess-guess-guess"))[0] for _ in range(FAILURES_PER_MINUTE + 2)]
    assert statuses == [401] * FAILURES_PER_MINUTE + [429] * 2
    async with ask.request("/api/population", token=None) as response:
        assert 0 < int(response.headers["Retry-After"]) <= 60
    assert (await ask("/api/population"))[0] == 200


def test_failures_are_forgotten_after_a_minute_and_of_a_bounded_number_of_addresses() -> None:
    failures = Failures()
    assert [failures.count("a", 0.0) for _ in range(FAILURES_PER_MINUTE)] == [0] * FAILURES_PER_MINUTE
    assert failures.count("a", 1.0) == 59
    assert failures.count("b", 1.0) == 0
    assert failures.count("a", 61.0) == 0
    for number in range(2 * ADDRESSES_REMEMBERED):
        failures.count(str(number), 62.0)
    assert len(failures._recent) == ADDRESSES_REMEMBERED


def test_who_forgets_the_token_now_and_then_is_never_told_of_and_who_keeps_on_is_told_of_once() -> None:
    failures = Failures()
    with capture_logs() as log:
        assert [failures.count("a", 15.0 * i) for i in range(100)] == [0] * 100
    assert log == []
    with capture_logs() as log:
        for second in range(600):  # ten of them a minute are counted, the others told to wait
            failures.count("b", float(second))
    assert [line["event"] for line in log] == ["http_token_failures"]
    with capture_logs() as log:
        for second in range(1000, 1020):
            failures.count("b", float(second))
    assert [line["event"] for line in log] == ["http_token_failures"]


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json"]
)
async def test_a_write_that_is_not_declared_json_is_refused(ask: Asked, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    status, body = await ask("/api/control", "POST", data=b'{"command": "stop"}', headers=headers)
    assert status == 415 and "application/json" in body["error"]


async def test_a_body_of_two_megabytes_is_refused_be_it_sent_whole_in_pieces_or_compressed(ask: Asked) -> None:
    large = b'{"command": "' + b"x" * 2_000_000 + b'"}'

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 100_000):
            yield large[start : start + 100_000]

    headers = {"Content-Type": "application/json"}
    bodies: list[Any] = [io.BytesIO(large), pieces(), gzip.compress(large)]
    for data, encoding in zip(bodies, ({}, {}, {"Content-Encoding": "gzip"}), strict=True):
        status, body = await ask("/api/control", "POST", data=data, headers={**headers, **encoding})
        assert status == 413 and "65536 bytes" in body["error"]


async def test_a_body_that_does_not_come_is_not_waited_for(ask: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "BODY_SECONDS", 0.1)
    head = f"POST /api/control HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += 'Content-Type: application/json\r\nContent-Length: 20\r\n\r\n{"comm'
    assert b" 408 " in await raw(ask.url, head.encode())


async def test_a_connection_that_says_nothing_is_closed(observer: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SILENT_SECONDS", 0.1)
    async with served(observer) as ask:
        assert await raw(ask.url, b"GET /livez HTTP/1.1\r\nHost: loc") == b""


async def test_connections_beyond_the_limit_are_closed_and_those_within_it_served(
    observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 5)
    async with served(observer) as ask:
        assert (await ask("/livez"))[0] == 200  # keeps its connection
        address = urlsplit(ask.url)
        idle = [await asyncio.open_connection(address.hostname, address.port) for _ in range(20)]
        ends = await asyncio.gather(
            *(asyncio.wait_for(reader.read(1), 0.5) for reader, _ in idle), return_exceptions=True
        )
        assert ends.count(b"") >= 15
        assert (await ask("/livez"))[0] == 200
        for _, writer in idle:
            writer.close()


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"null", b"[]", b'"pause"', b"[" * 60_000, b'{"command": ' + b'{"command": ' * 4_000),
        *(b'{"command": "fly"}', b'{"command": NaN}', b'{"command": 1}', b'{"command": null}'),
        *(b'{"command": "pause", "search": "other"}', b'{"commands": "pause"}', b'{"command": "pause"} {}'),
        *(b'\xff\xfe{"command": "pause"}', b'{"command": "\\ud800"}'),
    ],
)
async def test_a_body_that_is_no_command_gets_one_sentence(ask: Asked, body: bytes) -> None:
    status, answer = await ask("/api/control", "POST", data=body, headers={"Content-Type": "application/json"})
    assert status == 400
    assert list(answer) == ["error"] and "pause" in answer["error"] and "Traceback" not in answer["error"]


@pytest.mark.parametrize(
    "query",
    [
        *("limit=0", "limit=501", "limit=99999999999999999999", "limit=-1", "limit=1e2", "limit=NaN", "limit=1_0"),
        *("limit=%D9%A1", "limit=", "offset=-1", "offset=1.5", "offset=99999999999"),
    ],
)
async def test_a_bad_query_gets_one_sentence_that_names_it(ask: Asked, query: str) -> None:
    status, answer = await ask(f"/api/population?{query}")
    assert status == 400 and answer["error"].startswith(query.partition("=")[0] + " must be a whole number from")


@pytest.mark.parametrize(
    "path", ["/api/candidates/0123456789abcdef", "/api/candidates/..%2f..%2fhttp-token", "/%00", "/page"]
)
async def test_what_is_not_there_is_not_found(ask: Asked, path: str) -> None:
    status, answer = await ask(path)
    assert status == 404 and list(answer) == ["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/status"),
        ("PUT", "/api/control"),
        ("DELETE", "/api/control"),
        ("HEAD", "/api/events"),
        ("OPTIONS", "/api/status"),
    ],
)
async def test_a_wrong_method_is_told_the_right_one(ask: Asked, method: str, path: str) -> None:
    async with ask.request(path, method, headers={"Content-Type": "application/json"}) as response:
        assert response.status == 405
        assert "GET" in response.headers["Allow"]


async def test_before_there_is_a_search_the_answers_say_so(ask: Asked) -> None:
    assert (await ask("/api/status"))[0] == 503
    assert (await ask("/api/control"))[0] == 503
    assert await ask("/livez") == (200, {"alive": True})
    status, ready = await ask("/readyz")
    assert status == 503 and not ready["redis"] and not ready["ready"]
    assert await ask("/api/population") == (200, {"total": 0, "limit": 50, "offset": 0, "members": []})


async def test_an_error_that_nobody_expected_is_logged_and_not_told(observer: Observer, ask: Asked) -> None:
    class Broken:
        def get(self, _: str) -> None:
            raise RuntimeError("a-detail-from-within")

    observer.search = type("S", (), {"ledger": Broken()})()
    with capture_logs() as log:
        async with ask.request("/api/candidates/0123456789abcdef") as response:
            text = await response.text()
    assert response.status == 500
    assert set(json.loads(text)) == {"error"}
    assert "a-detail-from-within" not in text and "Traceback" not in text
    assert [line["event"] for line in log] == ["http_request_failed"]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/livez", 200), ("/api/population", 200), ("/metrics", 200), ("/nothing", 404), ("/api/status", 503)],
)
async def test_every_reply_keeps_browsers_from_guessing_framing_storing_and_sharing_it(
    ask: Asked, path: str, status: int
) -> None:
    async with ask.request(path) as response:
        headers = response.headers
    assert response.status == status
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Server"] == "selfpruner"
    assert not [name for name in headers if name.lower().startswith("access-control")]


async def test_on_loopback_an_empty_token_opens_the_api_but_not_to_other_pages(observer: Observer) -> None:
    async with served(observer, token=None) as ask:
        assert (await ask("/api/population"))[0] == 200
        assert (await ask("/api/population", headers={"Origin": "https://evil.example"}))[0] == 403
        assert (await ask("/api/population", headers={"Host": "evil.example"}))[0] == 403


def test_a_token_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    first = open_access(HttpSettings(), tmp_path)
    again = open_access(HttpSettings(), tmp_path)
    assert first.token is not None and len(first.token.get_secret_value()) >= 43
    assert first == again
    file = tmp_path / "http-token"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["http-token"]
    file.write_text("")  # a machine that died while it was written
    assert open_access(HttpSettings(), tmp_path).token not in (None, first.token)
    assert first.token.get_secret_value() not in repr(first)


def test_a_token_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x" * 40)
    (tmp_path / "http-token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="cannot be kept"):
        open_access(HttpSettings(), tmp_path)


def test_a_given_token_is_taken_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of-sixteen-letters\n")
    access = open_access(HttpSettings(token_file=tmp_path / "secret"), tmp_path)
    assert access.secrets == ["of-sixteen-letters"] and access.kept_in is None
    for bad in ("", "short", "with blanks in between it", "x" * 100_000, "not UTF-8 \udcff"):
        (tmp_path / "secret").write_text(bad, errors="surrogateescape")
        with pytest.raises(SettingsError, match=r"http\.token_file") as caught:
            open_access(HttpSettings(token_file=tmp_path / "secret"), tmp_path)
        assert not bad or bad not in str(caught.value)
    with pytest.raises(SettingsError, match="cannot be used"):
        open_access(HttpSettings(token_file=tmp_path / "nowhere"), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["http.host=0.0.0.0", "http.token=''"], "http.token must not be empty"),
        (["http.host=gpu-host", "http.token=''"], "http.token must not be empty"),
        (["http.token=too-short"], "http.token has an invalid value"),
        (["http.token=a-token-of-some-length", "http.token_file=x"], "not both"),
        (["http.port=70000"], "http.port has an invalid value: input should be less"),
        (["http.allowed_hosts=['https://x']"], "http.allowed_hosts"),
        (['http.host="\\0"'], "neither an address nor a host name"),
        (["http.host=a..b"], "neither an address nor a host name"),
        (["http.host=''"], "neither an address nor a host name"),
        (["http.prot=1"], "did you mean 'http.port'"),
    ],
)
def test_settings_of_the_api_that_cannot_be_get_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(None, ["target.model=m", "target.rate=0.3", *overrides])
    assert sentence in str(caught.value)
    assert "too-short" not in str(caught.value) and "a-token-of" not in str(caught.value)


def test_beyond_loopback_a_token_is_made_as_on_it(tmp_path: Path) -> None:
    settings = load(None, ["target.model=m", "target.rate=0.3", "http.host=0.0.0.0"])
    assert not settings.http.on_loopback
    assert open_access(settings.http, tmp_path) != Access(None)
