"""TLS to the server: an impossible connection is one sentence, not an outage to wait for."""

import asyncio
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import SettingsError
from protocol.queue.connection import RedisRetry, connect
from tests.support.compose import free_port
from tests.support.servers import Server, server_binary


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a self-signed certificate for 127.0.0.1, with its key beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "certificate.pem"


@pytest.fixture(scope="module")
def tls_server(authority: Path) -> Iterator[int]:
    """The port of a server with TLS."""
    binary = server_binary("redis")
    if binary is None:
        pytest.skip("no redis-server on this machine (Debian: redis-server)")
    folder = Path(tempfile.mkdtemp(prefix="sp-"))
    server = Server(binary, folder)
    port = free_port()
    options = ["--tls-port", str(port), "--bind", "127.0.0.1", "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", str(authority), "--tls-key-file", str(authority.with_name("key.pem"))]
    server.start(*options)
    yield port
    server.kill()
    shutil.rmtree(folder)


async def said(url: str) -> str:
    """Return the error message of a connection to `url`."""
    with pytest.raises(SettingsError) as refused:
        redis: Any = connect(url)
        try:
            await RedisRetry(redis, "a")(redis.ping)
        finally:
            await redis.aclose()
    return str(refused.value)


async def test_a_server_whose_certificate_is_trusted_is_used(tls_server: int, authority: Path) -> None:
    redis: Any = connect(f"rediss://127.0.0.1:{tls_server}/0?ssl_ca_certs={authority}")
    assert await RedisRetry(redis, "a")(redis.ping)
    await redis.aclose()


async def test_a_certificate_that_is_not_trusted_is_a_sentence_with_the_option_that_helps(tls_server: int) -> None:
    sentence = await said(f"rediss://:secret@127.0.0.1:{tls_server}/0")
    assert re.search(r"certificate is not trusted .*ssl_ca_certs=FILE", sentence) and "secret" not in sentence


async def test_a_server_that_answers_without_tls_is_a_sentence() -> None:
    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-DENIED Redis is running in protected mode\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert "without TLS it is redis://" in await said(f"rediss://127.0.0.1:{port}/0")
        assert "accepts no connection from this machine" in await said(f"redis://127.0.0.1:{port}/0")


@pytest.mark.parametrize("content", [None, "no certificate"])
async def test_a_file_of_authorities_that_cannot_be_used_is_a_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "ca.pem").write_text(content)
    sentence = await said(f"rediss://:secret@127.0.0.1:1/0?ssl_ca_certs={tmp_path / 'ca.pem'}")
    assert "TLS files" in sentence and "secret" not in sentence
