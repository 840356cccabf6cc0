"""`selfpruner run | daemon`: a search with everything on this machine, or with workers elsewhere."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import structlog
import typer

from daemon.commands import flags
from daemon.commands.output import name_charts, print_json, stdout_console
from daemon.monitor.front import FRONT_CHART, show_front
from daemon.monitor.summary import Summary, show
from daemon.settings.settings import Settings
from daemon.settings.sources import load, load_or_quickstart
from protocol.errors import SelfPrunerError
from protocol.runtime import logs

NOTHING_MEASURED = "no candidate could be measured; evaluations.jsonl and the log say why"

log = structlog.get_logger()


def run(
    config: Annotated[Path | None, typer.Argument(help="YAML file of settings; quickstart.yaml by default.")] = None,
    set_: flags.Set = None,
    json_: flags.Json = False,
) -> None:
    """Search on this machine: starts a server for the queue (Valkey), a local LLM, a worker and the daemon."""
    from daemon.launch.run import run_here  # not at the start of every command: it takes a fifth of that time

    settings = load_or_quickstart(config, set_ or [])
    if settings.target.rates:
        raise typer.Exit(_run_front(settings, json_=json_))
    summary, interrupted = run_here(settings)
    code = _finish(summary, interrupted, _print_json if json_ else _print_table)
    if summary and not json_:
        name_charts(settings)
    raise typer.Exit(code)


def _run_front(settings: Settings, *, json_: bool) -> int:
    """Search at each rate of target.rates, show the front, and return the exit code."""
    from daemon.launch.front import run_front
    from daemon.launch.run import check_here, run_here

    for each in settings.of_each_rate:
        known = {"learn_from": settings.search.learn_from}  # the searches before it have not run yet
        check_here(each.model_copy(update={"search": each.search.model_copy(update=known)}))
    front, interrupted = run_front(settings, run_here)
    if front is not None and json_:
        print_json(front.model_dump())
    elif front is not None:
        show_front(front, stdout_console())
        stdout_console().print(f"chart: {settings.folder / FRONT_CHART}", soft_wrap=True)
    if interrupted is not None:
        return 128 + interrupted
    if front is not None and front.finished and all(point.best is None for point in front.points):
        raise SelfPrunerError(NOTHING_MEASURED)
    return 0


def daemon(
    config: Annotated[Path, typer.Argument(help="YAML file of settings.")],
    set_: flags.Set = None,
    stay: Annotated[
        bool, typer.Option("--stay", help="Keep running after the search has ended or failed, until a signal.")
    ] = False,
) -> None:
    """Search with workers, Redis and LLM endpoints that run elsewhere."""
    from daemon.http_api.stay import stay_after_end, stay_after_error
    from daemon.launch.run import run_daemon

    try:
        settings = load(config, set_ or [])
        stream = logs.service_stream()
        summary, interrupted, access = run_daemon(settings, stream)
        # A table on stdout would break the log's JSON lines.
        code = _finish(summary, interrupted, _print_table if stream == "stderr" else _log_summary)
    except SelfPrunerError as error:
        if stay:
            stay_after_error(error)
        raise
    if stay and code == 0:
        stay_after_end(settings, access)
    raise typer.Exit(code)


def _print_json(summary: Summary) -> None:
    print_json(summary.model_dump())


def _print_table(summary: Summary) -> None:
    show(summary, stdout_console())


def _log_summary(summary: Summary) -> None:
    log.info("search_ended", **summary.model_dump(include={"finished", "candidates", "tokens", "seconds"}))


def _finish(summary: Summary | None, interrupted: signal.Signals | None, show_it: Callable[[Summary], None]) -> int:
    """Show the summary, if there is one, and return the exit code."""
    if summary is not None:
        show_it(summary)
    if interrupted is not None:
        return 128 + interrupted
    if summary is not None and summary.finished and summary.best is None:
        raise SelfPrunerError(NOTHING_MEASURED)
    return 0
