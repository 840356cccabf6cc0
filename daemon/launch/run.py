"""`selfpruner run`, a search with everything on this machine, and `selfpruner daemon`, whose services run elsewhere."""

import shutil
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from daemon.http_api.token import Access, open_access
from daemon.launch.front import read_other_rates
from daemon.launch.launch import Launch
from daemon.launch.lessons import read_lessons
from daemon.launch.llm import read_replay, secrets_of
from daemon.local.folder_lock import FolderLock, lock_folder
from daemon.local.llm_server import find_gguf
from daemon.local.services import local_llm, workers
from daemon.local.valkey import embedded_server
from daemon.monitor.follower import Follower
from daemon.monitor.run_screen import Display
from daemon.monitor.summary import Summary
from daemon.settings.settings import Settings
from daemon.settings.target import check_lengths, check_text
from daemon.state.journal import LOG, PROFILE
from daemon.trackers.kinds import check_trackers
from protocol.errors import SettingsError, UsageError
from protocol.runtime import logs
from protocol.runtime.paths import check_model
from protocol.runtime.signals import run_in_thread, run_until_signal


def run_here(settings: Settings) -> tuple[Summary | None, signal.Signals | None]:
    """Run a search on this machine until it ends or a signal comes. Returns summary and signal, which may be None.

    Raises UsageError for invalid settings before anything is started.
    """
    check_here(settings)
    with _no_folder_of_nothing(settings.folder), lock_folder(settings.folder) as lock:
        access = _configure_logs(settings, "stderr")
        display = Display(Console(stderr=True)) if sys.stderr.isatty() else None
        return run_until_signal(_run_embedded(settings, access, display, lock))


@contextmanager
def _no_folder_of_nothing(folder: Path) -> Iterator[None]:
    """If the block fails because of invalid input before the model was measured, remove the folder that it made."""
    was_there = folder.exists()
    try:
        yield
    except UsageError:
        if not was_there and not (folder / PROFILE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def run_quietly(settings: Settings, display: Follower) -> tuple[Summary | None, signal.Signals | None]:
    """Do as `run_here` does for another program, which may have an event loop: in a thread, and report to `display`.

    The search logs to its folder only, and the program's own logging is left as it was.
    """
    check_here(settings)
    with _no_folder_of_nothing(settings.folder), lock_folder(settings.folder) as lock, logs.left_as_before():
        access = _configure_logs(settings, None)
        return run_in_thread(_run_embedded(settings, access, display, lock))


def run_daemon(settings: Settings, stream: logs.Stream) -> tuple[Summary | None, signal.Signals | None, Access | None]:
    """Run a daemon until its search ends or a signal comes. Returns summary, signal and API access, which may be None.

    Raises UsageError for invalid settings before anything is started.
    """
    redis_url = settings.redis.full_url
    if redis_url is None:
        raise SettingsError("the setting redis.url is missing: the daemon needs a Redis server that workers reach too")
    read_replay(settings)  # now, rather than when the folder of the search has been made
    read_lessons(settings)
    read_other_rates(settings)
    if lacks_llm(settings):
        raise SettingsError("the setting llm.endpoints is missing: give at least one OpenAI-compatible endpoint")
    check_trackers(settings)
    access = _configure_logs(settings, stream)
    announce = partial(_announce, access)
    launch = Launch(settings, redis_url, settings.llm.endpoints, embedded=False, access=access, announce=announce)
    return *run_until_signal(launch.run()), access


def check_here(settings: Settings) -> None:
    """Raise UsageError if a file of the settings is missing, or if a text is certainly too short for its windows."""
    check_files(settings)
    check_lengths(settings.spec().texts)


def check_files(settings: Settings) -> None:
    """Raise UsageError if the model, a text, a key, a transcript, a tracker or the local LLM's file is missing."""
    check_model(settings.target.model)  # now, rather than when the worker loads it
    for text in filter(None, (settings.data.calibration, settings.data.fitness, settings.data.report)):
        check_text(text)  # now, rather than when the worker reads it
    secrets_of(settings)  # now, rather than when the folder of the search has been made
    check_trackers(settings)
    read_replay(settings)
    read_lessons(settings)
    read_other_rates(settings)
    if lacks_llm(settings):
        find_gguf(settings.local_llm.gguf)


def lacks_llm(settings: Settings) -> bool:
    """Whether the search asks an LLM, and has neither an endpoint nor a transcript to replay."""
    return settings.search.asks_llm and not settings.llm.endpoints and not settings.llm.replay


def _configure_logs(settings: Settings, stream: logs.Stream | None) -> Access | None:
    """Configure the log of a search, with secrets redacted; without a `stream`, only its file.

    Returns the access to its HTTP API, or None if disabled.
    """
    file, own = settings.folder / LOG, secrets_of(settings)
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
        access = open_access(settings.http, settings.folder) if settings.http.enabled else None
        secrets = [*own, *(access.secrets if access else [])]
        where: dict[str, Any] = {"console": False} if stream is None else {"stream": stream}
        logs.configure(file=file, **where, secrets=secrets, search=settings.search.name)
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        raise SettingsError(f"run.folder: {file} cannot be written: {error}") from error
    return access


def _announce(access: Access | None, url: str) -> None:
    """Show a person the address of the page, with a generated token; never write the token to a log."""
    if sys.stderr.isatty():
        sys.stderr.write(f"page of the search: {access.address(url) if access else url}\n")


async def _run_embedded(
    settings: Settings, access: Access | None, display: Follower | None, lock: FolderLock
) -> Summary | None:
    """Start the server, the local LLM and the workers, then search. End them in reverse order."""
    async with AsyncExitStack() as stack:
        url = settings.redis.full_url
        if url is None:
            url = await stack.enter_async_context(embedded_server(settings.folder))
        endpoints = settings.llm.endpoints
        duties: list[Callable[[], Coroutine[Any, Any, None]]] = [lock.keep_forever]
        if lacks_llm(settings):
            llm = await stack.enter_async_context(local_llm(settings))
            endpoints = (llm.endpoint,)
            duties.append(llm.check_loads)
        workers_are_unusable = await stack.enter_async_context(workers(settings, url, console=display is None))
        launch = Launch(
            settings,
            url,
            endpoints,
            embedded=True,
            workers_are_unusable=workers_are_unusable,
            access=access,
            announce=partial(_announce, access),
            display=display,
            more_duties=duties,
        )
        return await launch.run()
