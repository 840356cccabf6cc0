"""Requests that are not valid HTTP: 4xx, one sentence, few and short log lines, and the server goes on."""

import asyncio
import json
import random
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from daemon.http_api import server as http_server
from daemon.monitor.events import Event
from daemon.monitor.observer import Observer
from protocol.runtime import logs
from tests.support.http_client import TOKEN, Asked
from tests.support.malformed_http import CORPUS, get, mutated, post, with_token
from tests.support.servers import eventually

LONGEST_LINE = 300


@pytest.fixture(autouse=True)
def log_file(tmp_path: Path, restored_logs: None) -> Path:
    logs.configure(file=tmp_path / "log.jsonl", console=False)
    return tmp_path / "log.jsonl"


async def reply(ask: Asked, request: bytes, *, patience: float = 10, pieces: int = 1) -> bytes:
    """What comes back until the server closes the connection; `patience` 0 does not wait for it."""
    address = urlsplit(ask.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        for start in range(0, len(request), max(1, len(request) // pieces)):
            if writer.transport.is_closing():
                break
            writer.write(request[start : start + max(1, len(request) // pieces)])
            await asyncio.sleep(0.001 if pieces > 1 else 0)
        return await asyncio.wait_for(reader.read(), patience) if patience else b""
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def is_alive(ask: Asked) -> bool:
    return (await ask("/livez", token=None))[0] == 200


def told(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if "http_api_listening" not in line]


def check_log(file: Path, most_lines: int) -> None:
    text = file.read_text()
    assert "Traceback" not in text and "exception" not in text
    lines = told(file)
    assert len(lines) <= most_lines and max(map(len, lines), default=0) <= LONGEST_LINE


@pytest.mark.parametrize("bears_token", [False, True])
@pytest.mark.parametrize("request_", CORPUS.values(), ids=[name[:60] for name in CORPUS])
async def test_a_malformed_request_is_refused_in_one_sentence(
    ask: Asked, log_file: Path, request_: bytes, bears_token: bool
) -> None:
    answer = await reply(ask, with_token(request_, TOKEN) if bears_token else request_)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1][:1] == b"4"
    assert b"Server: selfpruner" in head and b"nosniff" in head
    assert len(body) < 200
    check_log(log_file, 1)
    assert await is_alive(ask)


async def test_a_client_that_still_sends_when_it_is_refused_gets_the_answer(ask: Asked) -> None:
    """Closing a socket with unread bytes resets the connection, and the client's kernel then drops our answer."""
    address = urlsplit(ask.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    request = get(b"/livez?" + b"a" * 400_000)
    for start in range(0, len(request), 40_000):
        writer.write(request[start : start + 40_000])
        await asyncio.sleep(0.02)
    assert (await asyncio.wait_for(reader.read(), 10)).split()[1] == b"400"
    writer.close()


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
async def test_a_body_that_cannot_be_decoded_is_the_clients_error(ask: Asked, encoding: bytes) -> None:
    request = post(b"Content-Encoding: " + encoding + b"\r\nContent-Length: 9\r\n", b"not gzip!")
    answer = await reply(ask, with_token(request, TOKEN))
    assert answer.split()[1] == b"400" and "cannot be decoded" in json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]


async def test_an_absolute_url_of_this_server_and_headers_that_ask_for_another_protocol_are_answered(
    ask: Asked,
) -> None:
    websocket = b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    for request in (get(b"http://localhost/livez"), get(b"/livez", b"Upgrade: h2c\r\n"), get(b"/livez", websocket)):
        assert (await reply(ask, request)).split()[1] == b"200"


async def test_many_malformed_requests_are_counted_in_few_lines(
    ask: Asked, log_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(50):
        await reply(ask, get(b"/livez", b"nonsense\r\n"))
    check_log(log_file, 1)
    monkeypatch.setattr(http_server, "LOG_SECONDS", 0.0)
    await reply(ask, get(b"/livez", b"nonsense\r\n"))
    lines = [json.loads(line) for line in told(log_file)]
    assert [line["requests"] for line in lines] == [1, 50]
    assert {line["event"] for line in lines} == {"http_request_malformed"}


@pytest.mark.parametrize("seed", range(4))
async def test_random_bytes_neither_end_the_server_nor_fill_its_log(ask: Asked, log_file: Path, seed: int) -> None:
    draw = random.Random(seed)
    requests = [with_token(request, TOKEN) if draw.random() < 0.5 else request for request in mutated(seed, 300)]
    for start in range(0, len(requests), 20):
        batch = requests[start : start + 20]
        await asyncio.gather(
            *(reply(ask, request, patience=0.0, pieces=draw.choice((1, 1, 2, 7))) for request in batch)
        )
        assert await is_alive(ask)
    check_log(log_file, 20)


async def test_events_for_a_client_that_never_reads_take_bounded_memory_and_it_is_disconnected(
    ask: Asked, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "UNREAD_SECONDS", 1.0)
    address = urlsplit(ask.url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        client.sendall(with_token(get(b"/api/events"), TOKEN))

        await eventually(lambda: ask.api.metrics.event_streams == 1)
        server = ask.api._server._runner.server
        assert server is not None
        (connection,) = (c for c in server.connections if c.transport and c.transport.get_extra_info("peername"))
        transport = connection.transport
        assert transport is not None
        largest = 0
        for number in range(3000):  # 30 MB
            observer.events.add([Event("round_started", {"round": number, "filler": "x" * 10_000})])
            if number % 10 == 0:
                await asyncio.sleep(0)
                largest = max(largest, transport.get_write_buffer_size())
        assert 0 < largest < 200_000

        await eventually(lambda: ask.api.metrics.event_streams == 0)
    assert await is_alive(ask)


async def test_a_client_that_reads_slowly_gets_the_whole_of_its_answer(
    ask: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer stays above the low-water mark for several times the limit, but it shrinks all that time."""
    limit, size = 1.0, 4_000_000
    monkeypatch.setattr(http_server, "UNREAD_SECONDS", limit)
    address = urlsplit(ask.url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (address.hostname, address.port))
        transport = await _transport(ask)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        transport.write(bytes(size))
        got = 0
        for _ in range(40):  # four times the limit
            got += len(await loop.sock_recv(client, 2**15))
            await asyncio.sleep(limit / 10)
        assert size // 2 < transport.get_write_buffer_size() < size
        while got < size and (piece := await loop.sock_recv(client, 2**20)):
            got += len(piece)
        assert got == size


async def _transport(ask: Asked) -> asyncio.WriteTransport:
    """The server's side of its only connection."""

    def connections() -> list[asyncio.BaseTransport]:
        server = ask.api._server._runner.server
        assert server is not None
        return [each.transport for each in server.connections if each.transport is not None]

    await eventually(connections)
    (transport,) = connections()
    assert isinstance(transport, asyncio.WriteTransport)
    return transport
