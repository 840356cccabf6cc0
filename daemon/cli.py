"""`selfpruner …`: the command line. It and the commands that prune may name gpu_worker, in function bodies."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.live import Live

from daemon.commands import finetune as finetune_command
from daemon.commands import flags
from daemon.commands import prune as prune_command
from daemon.commands import pruning as pruning_commands
from daemon.commands import speed as speed_command
from daemon.commands import tables as answers
from daemon.commands import zero_shot as zero_shot_command
from daemon.commands.flags import FLAG_ERROR, flag_sentence
from daemon.commands.output import answer, print_json, stdout_console
from daemon.http_api.after_end import stay_after_end, stay_to_be_mended
from daemon.http_api.token import Access
from daemon.launch.launch import Launch
from daemon.launch.run_here import announce, configure_logs, run_here
from daemon.monitor.events import Event
from daemon.monitor.remote import NotRunning, RemoteSearch, ask, open_remote, saved_status
from daemon.monitor.status import Status
from daemon.monitor.summary import Summary, show
from daemon.monitor.watch import json_lines, on_screen
from daemon.monitor.watch import watch as follow
from daemon.monitor.watch_screen import Screen, standing
from daemon.search.make_agents import check_proposer
from daemon.settings.packages import need
from daemon.settings.settings import Settings
from daemon.settings.sources import load
from protocol.errors import SelfPrunerError, SettingsError, UsageError
from protocol.queue.connection import password_of
from protocol.queue.control import Command
from protocol.runtime import logs
from protocol.runtime.signals import Interrupted, run_until_signal

log = structlog.get_logger()
app = typer.Typer(
    help="An LLM searches, by evolution, how much to prune from each layer of an LLM.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(pruning_commands.allocate)
app.command()(pruning_commands.evaluate)
app.command()(pruning_commands.export)
app.command()(zero_shot_command.zero_shot)
app.command()(finetune_command.finetune)
app.command()(prune_command.prune)
app.command()(speed_command.speed)

Config = Annotated[Path | None, typer.Argument(help="A YAML file of settings; quickstart.yaml when left out.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit code 2 and one sentence on stderr for what the user must mend."""
    try:
        code = app(args=arguments, prog_name="selfpruner", standalone_mode=False)
    except FLAG_ERROR as error:
        return _told(flag_sentence(error), 2)
    except SelfPrunerError as error:
        return _told(str(error), 2 if isinstance(error, UsageError) else 1)
    except Interrupted as end:
        return _told(f"interrupted; {end.left}", end.exit_code)
    return code if isinstance(code, int) else 0


def _told(sentence: str, code: int) -> int:
    print(f"selfpruner: {sentence}", file=sys.stderr)  # noqa: T201  (the one sentence for a person)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selfpruner {version('self-pruner')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _command_line(
    context: typer.Context,
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version, and no more.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        if text := context.get_help():  # with Rich it is printed already
            typer.echo(text)
        raise typer.Exit(2)
    # Beside an answer on stdout the log has no place; `run`, `daemon` and `worker` set up one of their own.
    logs.configure()


@app.command()
def run(config: Config = None, set_: flags.Set = None, json_: flags.Json = False) -> None:
    """Search with everything on this machine: an embedded Valkey, a local LLM, a worker and the daemon."""
    with as_file(files("configs") / "quickstart.yaml") as quickstart:
        settings = load(config or quickstart, set_ or [])
    summary, interrupted = run_here(settings)
    raise typer.Exit(_finish(summary, interrupted, _json if json_ else _table))


@app.command()
def daemon(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings.")],
    set_: flags.Set = None,
    stay: Annotated[
        bool, typer.Option("--stay", help="When the search has ended, or cannot go on, wait for a signal.")
    ] = False,
) -> None:
    """Search with workers, Redis and LLM endpoints that run elsewhere."""
    try:
        code, settings, access = _search_elsewhere(config, set_ or [])
    except SelfPrunerError as error:
        if stay:
            stay_to_be_mended(error)
        raise
    if stay and code == 0:
        stay_after_end(settings, access)
    raise typer.Exit(code)


def _search_elsewhere(config: Path, overrides: Sequence[str]) -> tuple[int, Settings, Access | None]:
    """The exit code of a search, and what it was searched with."""
    settings = load(config, overrides)
    redis_url = settings.redis.full_url
    if redis_url is None:
        raise SettingsError("the setting redis.url is missing: the daemon needs a Redis server that workers reach too")
    check_proposer(settings.search)
    if settings.search.asks_llm and not settings.llm.endpoints and not settings.llm.replay:
        raise SettingsError("the setting llm.endpoints is missing: give at least one OpenAI-compatible endpoint")
    stream = logs.service_stream()
    access = configure_logs(settings, stream)
    launch = Launch(
        settings,
        redis_url,
        settings.llm.endpoints,
        embedded=False,
        access=access,
        announce=partial(announce, access),
    )
    summary, interrupted = run_until_signal(launch.run())
    # Where stdout is the log, a table would be no JSON line.
    return _finish(summary, interrupted, _table if stream == "stderr" else _log_summary), settings, access


@app.command()
def worker(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The daemon's settings file: its search, Redis and worker limits are used."),
    ] = None,
    search: flags.SearchName = "default",
    redis_url: Annotated[str, typer.Option(envvar="SELFPRUNER_REDIS__URL")] = "redis://127.0.0.1:6379",
    redis_password_file: flags.RedisPasswordFile = None,
    lease_seconds: Annotated[float, typer.Option(help="A job without sign of life is given away after it.")] = 30.0,
    max_evaluation_seconds: Annotated[float, typer.Option(help="A longer evaluation has failed.")] = 1800.0,
    max_preparation_seconds: Annotated[float, typer.Option(help="For loading and calibrating the model.")] = 14_400.0,
    grace_seconds: Annotated[float, typer.Option(help="After SIGTERM, for the evaluation under way.")] = 20.0,
    own_gpu: Annotated[bool, typer.Option("--own-gpu", help="Use one GPU that no other worker here uses.")] = False,
    stay: Annotated[
        bool,
        typer.Option(
            "--stay", help="When it cannot work, say why; wait, or end after five minutes if the cause may pass."
        ),
    ] = False,
) -> None:
    """Prune and measure candidates of a search: one worker, one GPU."""
    need("torch", "worker")
    values = {
        "search": search,
        "redis_url": redis_url,
        "redis_password_file": redis_password_file,
        "lease_seconds": lease_seconds,
        "max_evaluation_seconds": max_evaluation_seconds,
        "max_preparation_seconds": max_preparation_seconds,
        "grace_seconds": grace_seconds,
        "own_gpu": own_gpu,
    }
    try:
        _work({**values, **_as_the_daemon(config, context)} if config else values)
    except SelfPrunerError as error:
        if stay:
            # Only a mistake in the settings lasts; a hub, a driver or memory may be there again at the next start.
            stay_to_be_mended(error, at_most=None if isinstance(error, SettingsError) else REST_SECONDS)
        raise


def _as_the_daemon(config: Path, context: typer.Context) -> dict[str, Any]:
    """A worker's options from the daemon's settings file, without those that a flag or a variable gives.

    The search's name comes from the file alone, so that daemon and workers cannot differ. Raises SettingsError.
    """
    given = {
        name for name in context.params if (source := context.get_parameter_source(name)) and source.name in _GIVEN
    }
    if "search" in given:
        raise SettingsError("give --search or --config, not both: the settings file names the search")
    settings = load(config)
    found: dict[str, Any] = {
        "redis_url": settings.redis.url,
        "redis_password_file": settings.redis.password_file,
        **settings.worker.model_dump(exclude={"count"}),
    }
    return {"search": settings.search.name} | {
        name: v for name, v in found.items() if v is not None and name not in given
    }


REST_SECONDS = 300.0
"""How long a worker with --stay waits before it ends, and so is started again, where the cause may pass by itself."""
_GIVEN = ("COMMANDLINE", "ENVIRONMENT")


def _work(values: dict[str, Any]) -> None:
    from gpu_worker.worker.options import worker_options
    from gpu_worker.worker.worker import run_worker

    options = worker_options(**values)
    logs.configure(stream=logs.service_stream(), secrets=password_of(options.redis_url), search=options.search)
    asyncio.run(run_worker(options))


@app.command()
def status(
    search: flags.SearchName = "default",
    redis_url: flags.RedisUrl = None,
    folder: flags.Folder = Path("runs"),
    json_: flags.Json = False,
) -> None:
    """Say how far a search is."""
    found = asyncio.run(_status(search, redis_url, folder))
    answer(found.model_dump(mode="json"), json_, lambda: standing(found))


@app.command()
def watch(
    search: flags.SearchName = "default",
    redis_url: flags.RedisUrl = None,
    folder: flags.Folder = Path("runs"),
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per change, as where stdout is no terminal.")
    ] = False,
) -> None:
    """Follow a search until it ends: live on a terminal, elsewhere as JSON. Ctrl-C ends the watching only."""
    try:
        asyncio.run(_watch(search, redis_url, folder, json_=json_))
    except BrokenPipeError:  # whoever read it has enough; the rest of the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command()
def best(
    search: flags.SearchName = "default",
    redis_url: flags.RedisUrl = None,
    folder: flags.Folder = Path("runs"),
    json_: flags.Json = False,
) -> None:
    """Print the best pruning rates so far."""
    record = asyncio.run(ask(search, redis_url, folder, RemoteSearch.best, otherwise="best.json"))
    answer(record, json_, lambda: answers.best(record))


@app.command()
def pause(
    search: flags.SearchName = "default", redis_url: flags.RedisUrl = None, folder: flags.Folder = Path("runs")
) -> None:
    """Ask nothing more and measure nothing more; what is being measured is finished. Survives restarts."""
    _command("pause", search, redis_url, folder)


@app.command()
def resume(
    search: flags.SearchName = "default", redis_url: flags.RedisUrl = None, folder: flags.Folder = Path("runs")
) -> None:
    """Go on after a pause."""
    _command("run", search, redis_url, folder)


@app.command()
def stop(
    search: flags.SearchName = "default", redis_url: flags.RedisUrl = None, folder: flags.Folder = Path("runs")
) -> None:
    """End the search's daemon; nothing measured is lost, and the search can be started again."""
    _command("stop", search, redis_url, folder)


def _json(summary: Summary) -> None:
    print_json(summary.model_dump())


def _table(summary: Summary) -> None:
    show(summary, stdout_console())


def _log_summary(summary: Summary) -> None:
    log.info("search_ended", **summary.model_dump(include={"finished", "candidates", "tokens", "seconds"}))


def _finish(summary: Summary | None, interrupted: signal.Signals | None, tell: Callable[[Summary], None]) -> int:
    if summary is not None:
        tell(summary)
    if interrupted is not None:
        return 128 + interrupted
    if summary is not None and summary.finished and summary.best is None:
        raise SelfPrunerError("no candidate could be measured; evaluations.jsonl and the log say why")
    return 0


async def _watch(search: str, redis_url: str | None, folder: Path, *, json_: bool) -> None:
    own = None if redis_url else folder / search
    with ExitStack() as stack:
        if json_ or not sys.stdout.isatty():
            tell = json_lines(sys.stdout)
        else:
            live = stack.enter_context(Live(console=Console(), auto_refresh=False))
            tell = on_screen(live, Screen())
        try:
            async with open_remote(search, redis_url, folder) as remote:
                await follow(remote, own, tell)
        except NotRunning:
            status = saved_status(own) if own else None
            if status is None:
                raise
            tell(status, (), [Event("search_ended", {"finished": status.finished})])


async def _status(search: str, redis_url: str | None, folder: Path) -> Status:
    """The running search's status; of one that ran here and has ended, the last one."""
    try:
        async with open_remote(search, redis_url, folder) as remote:
            return await remote.status()
    except NotRunning:
        status = saved_status(folder / search) if redis_url is None else None
        if status is None:
            raise
        return status


def _command(command: Command, search: str, redis_url: str | None, folder: Path) -> None:
    async def write() -> None:
        async with open_remote(search, redis_url, folder) as remote:
            await remote.command(command)

    asyncio.run(write())
    Console().print(f"{search}: {_DONE[command]}", highlight=False)


_DONE: dict[Command, str] = {
    "pause": "paused; what is being measured is finished",
    "run": "goes on",
    "stop": "stops; what is measured is kept",
}
