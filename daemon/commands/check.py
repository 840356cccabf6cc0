"""`selfpruner check`: whether a search can run, and what it will take, before anything is loaded."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from daemon.commands import flags
from daemon.commands.output import print_result
from daemon.settings.packages import need
from daemon.settings.sources import load_or_quickstart
from protocol.errors import SettingsError
from protocol.runtime import logs

if TYPE_CHECKING:
    from daemon.launch.check import Report, State

COLOURS: "dict[State, str]" = {"ok": "green", "warning": "yellow", "error": "red", "unknown": "yellow"}


def check(
    config: Annotated[Path | None, typer.Argument(help="YAML file of settings; quickstart.yaml by default.")] = None,
    set_: flags.Set = None,
    gpu: Annotated[
        str | None, typer.Option(help="Estimate for this GPU, such as `h100`, instead of for this machine.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of such GPUs for the model.")] = 1,
    ask: Annotated[
        bool,
        typer.Option(
            "--ask/--no-ask",
            help="Ask each endpoint a question of the search. Otherwise, only check its address, key and model.",
        ),
    ] = True,
    json_: flags.Json = False,
) -> None:
    """Check whether a search can run, and estimate the hours, tokens and money that it takes.

    Loads no weights, but unpacks a GGUF file, as a search does. Exit code 2 if something must be put right first.
    """
    settings = load_or_quickstart(config, set_ or []).as_one_search
    need("torch", "worker")
    logs.configure(level="ERROR")
    from gpu_worker.measuring.devices import GPU_NAMES, speed_of_gpu, speed_of_this_machine

    gpu = gpu and gpu.lower().replace(" ", "-")
    if gpu is not None and gpu not in GPU_NAMES:
        raise SettingsError(f"--gpu cannot be {gpu!r}: it is one of {', '.join(GPU_NAMES)}")
    if gpus != 1 and gpu is None:
        raise SettingsError("--gpus needs --gpu: without it, the GPUs of this machine count")
    from daemon.launch.check import check as check_search
    from gpu_worker.evaluation.feasibility import find_needs

    given = None if gpu is None else speed_of_gpu(gpu)
    spec = settings.spec()
    with ExitStack() as stack:
        line = stack.enter_context(Console(stderr=True).status("checking")) if sys.stderr.isatty() else None
        report = asyncio.run(
            check_search(
                settings,
                lambda: find_needs(spec, given, gpus),
                lambda: given or speed_of_this_machine(spec.dtype),
                asks=ask,
                estimates=given is not None,
                said=line.update if line else lambda _: None,
            )
        )
    print_result(report.record, json_, lambda: _tables(report))
    if report.errors:
        raise SettingsError(
            f"{config or 'quickstart.yaml'}: put this right before the search: {', '.join(report.errors)}"
        )


def _tables(report: "Report") -> Iterator[RenderableType]:
    table = Table(box=None, show_header=False)
    for finding in report.findings:
        table.add_row(finding.what, Text(finding.state, COLOURS[finding.state]), Text(finding.says))
    yield table
    if report.cost is not None:
        yield f"\nexpected on {report.device} (least to most)"
        yield from (f"  {line}" for line in report.cost.arithmetic)
