"""`selfpruner worker`: prunes and measures candidates of a search."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.commands import flags
from daemon.commands.gpu_workers import work_on_gpus
from daemon.http_api.stay import stay_after_error
from daemon.settings.packages import need
from daemon.settings.sources import load
from protocol.errors import SelfPrunerError, SettingsError
from protocol.queue.connection import password_of
from protocol.runtime import logs

REST_SECONDS = 300.0
"""Seconds that a worker with --stay waits after an error that may pass by itself. It then exits to be restarted."""
_SET_BY_USER = ("COMMANDLINE", "ENVIRONMENT")


def worker(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The daemon's settings file, for the search's name, Redis and time limits."),
    ] = None,
    search: flags.SearchName = "default",
    redis_url: Annotated[
        str, typer.Option(envvar="SELFPRUNER_REDIS__URL", help="The Redis server of the search.")
    ] = "redis://127.0.0.1:6379",
    redis_password_file: flags.RedisPasswordFile = None,
    lease_seconds: Annotated[
        float, typer.Option(help="Seconds without a heartbeat after which a job goes to another worker.")
    ] = 30.0,
    max_evaluation_seconds: Annotated[float, typer.Option(help="Time limit of one evaluation.")] = 1800.0,
    max_preparation_seconds: Annotated[
        float, typer.Option(help="Time limit for loading and calibrating the model.")
    ] = 14_400.0,
    grace_seconds: Annotated[float, typer.Option(help="Time to finish the evaluation after SIGTERM.")] = 20.0,
    own_gpu: Annotated[
        bool, typer.Option("--own-gpu", help="Use one GPU that no other worker on this machine uses.")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(help="Run this many workers, each on one GPU that no other worker uses.")
    ] = None,
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", help="Exit once the search ends, to free the GPU.")
    ] = False,
    idle_seconds: Annotated[
        float | None,
        typer.Option(help="Exit after this time without a candidate, not counting pauses."),
    ] = None,
    alive_file: Annotated[
        Path | None,
        typer.Option(help="A file to touch every five seconds, for liveness probes.", callback=flags.expanded_if_given),
    ] = None,
    stay: Annotated[
        bool,
        typer.Option(
            "--stay",
            help="After an error, keep running until a signal; for five minutes if the error may pass by itself.",
        ),
    ] = False,
) -> None:
    """Prune and measure candidates of a search. Start one worker per GPU, or use --gpus."""
    need("torch", "worker")
    from gpu_worker.worker.options import worker_options
    from gpu_worker.worker.worker import run_worker

    values = {
        "search": search,
        "redis_url": redis_url,
        "redis_password_file": redis_password_file,
        "lease_seconds": lease_seconds,
        "max_evaluation_seconds": max_evaluation_seconds,
        "max_preparation_seconds": max_preparation_seconds,
        "grace_seconds": grace_seconds,
        "own_gpu": own_gpu,
        "exit_when_done": exit_when_done,
        "idle_seconds": idle_seconds,
        "alive_file": alive_file,
    }
    try:
        options = worker_options(**{**values, **_from_config(config, context)} if config else values)
        logs.configure(stream=logs.service_stream(), secrets=password_of(options.redis_url), search=options.search)
        if gpus is None:
            asyncio.run(run_worker(options))
        else:
            raise typer.Exit(work_on_gpus(gpus, _given_flags(context)))
    except SelfPrunerError as error:
        if stay:
            # Only invalid settings are permanent. A hub, a driver or memory may be available at the next start.
            stay_after_error(error, at_most=None if isinstance(error, SettingsError) else REST_SECONDS)
        raise


def _from_config(config: Path, context: typer.Context) -> dict[str, Any]:
    """Return a worker's options from the daemon's settings file, except those set by a flag or a variable.

    The search's name comes from the file alone, so that daemon and workers cannot differ. Raises SettingsError.
    """
    given = {
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) and source.name in _SET_BY_USER
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


def _given_flags(context: typer.Context) -> list[str]:
    """Return the flags of this command line for one of several workers."""
    flags = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source and source.name == "COMMANDLINE" and parameter.name not in ("gpus", "own_gpu"):
            flags.append(parameter.opts[0])
            value = context.params[parameter.name or ""]
            if value is not True:
                flags.append(str(value))
    return flags
