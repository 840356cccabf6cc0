"""`selfpruner …`: the commands of daemon/commands. Turns every error into an exit code and a one-sentence message."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from daemon.commands import control, pruning
from daemon.commands.cache import cache
from daemon.commands.check import check
from daemon.commands.config import config
from daemon.commands.finetune import finetune
from daemon.commands.flags import FLAG_ERROR, flag_sentence
from daemon.commands.init import init
from daemon.commands.open import open_
from daemon.commands.prune import prune
from daemon.commands.push import push
from daemon.commands.report import report
from daemon.commands.run import daemon, run
from daemon.commands.speed import speed
from daemon.commands.worker import worker
from daemon.commands.zero_shot import zero_shot
from protocol.errors import SelfPrunerError, UsageError
from protocol.runtime import logs
from protocol.runtime.environment import THREADS
from protocol.runtime.signals import Interrupted

app = typer.Typer(
    help="Find how much to prune from each layer of an LLM. Another LLM runs the evolutionary search.",
    pretty_exceptions_enable=False,
)
for command in (
    init,
    config,
    check,
    prune,
    run,
    daemon,
    worker,
    control.status,
    control.watch,
    control.best,
    control.pause,
    control.resume,
    control.stop,
    report,
    pruning.export,
    push,
    finetune,
    pruning.evaluate,
    zero_shot,
    speed,
    pruning.allocate,
    cache,
):
    app.command()(command)
app.command("list")(control.list_)
app.command("open")(open_)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Invalid input returns exit code 2, with one sentence on stderr."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)  # before torch is imported
    try:
        code = app(args=arguments, prog_name="selfpruner", standalone_mode=False)
    except FLAG_ERROR as error:
        return _fail(flag_sentence(error), 2)
    except SelfPrunerError as error:
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except typer.Abort:
        return _fail("interrupted", 130)
    except Interrupted as end:
        return _fail(f"interrupted; {end.left}", end.exit_code)
    return code if isinstance(code, int) else 0


def _fail(sentence: str, code: int) -> int:
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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        if text := context.get_help():  # with Rich it is printed already
            typer.echo(text)
        raise typer.Exit(2)
    # The log must not mix with results on stdout. `run`, `daemon` and `worker` configure their own.
    logs.configure()
