"""Flags that several commands share: single ones, and groups that a command takes as one value."""

import os
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from protocol.plans.allocation import Method
from protocol.plans.plan import Split
from protocol.plans.shape import Granularity
from protocol.plans.spec import Dtype, Importance, Reconstruction, Scoring
from protocol.queue.connection import with_password
from protocol.results.formats import GgufType


def chosen(choice: Any, what: str, when_left_out: str = "") -> Any:
    """An option whose many choices stand in its help: beside its name they would take the names' room."""
    values = ", ".join(f"{one} (if left out)" if one == when_left_out else one for one in get_args(choice))
    return typer.Option(metavar="<choice>", help=f"{what}: {values}.")


Set = Annotated[list[str] | None, typer.Option("--set", help="One setting, such as target.rate=0.3; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
SearchName = Annotated[str, typer.Option("--search", help="The search's name.")]
PASSWORD_FILE = "SELFPRUNER_REDIS__PASSWORD_FILE"


def _with_password(url: str | None) -> str | None:
    """Commands beside a running deployment find its password where its daemon does, without another flag."""
    file = os.environ.get(PASSWORD_FILE)
    return with_password(url, Path(file)) if url and file else url


RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        envvar="SELFPRUNER_REDIS__URL",
        help="Left out: the search's embedded server. Its password may be in a file (docs/guides/many-machines.md).",
        callback=_with_password,
    ),
]
RedisPasswordFile = Annotated[
    Path | None, typer.Option("--redis-password-file", envvar=PASSWORD_FILE, help="Holds the password of --redis-url.")
]
Folder = Annotated[
    Path,
    typer.Option(
        "--folder",
        envvar="SELFPRUNER_RUN__FOLDER",
        show_envvar=False,  # of eighty columns its name leaves too little
        help="Where `selfpruner run` keeps searches (run.folder).",
    ),
]

Model = Annotated[str | None, typer.Option(help="A hub name, a folder, or `smollm2`.")]


def seed_of_torch(value: int | None) -> int | None:
    """A seed that torch takes: as a range the limit would fill the column of the types with its digits."""
    if value is not None and value >= 2**63:
        raise typer.BadParameter(f"{value} is not in the range 0<=x<2**63.")
    return value


Seed = Annotated[int, typer.Option(min=0, callback=seed_of_torch, help="Chooses the windows.")]
DtypeFlag = Annotated[Dtype, chosen(Dtype, "Of weights and activations")]


@dataclass(frozen=True)
class TextFlags:
    """The texts."""

    data: Annotated[
        str | None, typer.Option(help="The text to measure on: `wikitext2`, `c4`, `self`, or a text file.")
    ] = None
    calibration_data: Annotated[str | None, typer.Option(help="The text to score on; as --data if left out.")] = None
    report_data: Annotated[str | None, typer.Option(help="A second text to measure on.")] = None
    windows: Annotated[int | None, typer.Option(min=1, help="Windows of --data; all if left out.")] = None
    calibration_windows: Annotated[int, typer.Option(min=1, help="Windows of --calibration-data.")] = 32
    report_windows: Annotated[int | None, typer.Option(min=1, help="Windows of --report-data; all if left out.")] = None
    seqlen: Annotated[int, typer.Option(min=16, help="Tokens of a window; of a folder as on its card.")] = 2048


@dataclass(frozen=True)
class ExportTexts(TextFlags):
    """The texts of an export, which scores and measures even where none is named."""

    windows: Annotated[int | None, typer.Option(min=1, help="Windows of --data.")] = 8
    seqlen: Annotated[int, typer.Option(min=16, help="Tokens of a window.")] = 512


@dataclass(frozen=True)
class CalibrationFlags:
    """The text to score on, alone."""

    calibration_data: Annotated[
        str, typer.Option(help="The text to score on: `wikitext2`, `c4`, `self`, or a text file.")
    ] = "self"
    calibration_windows: Annotated[int, typer.Option(min=1, help="Windows of it.")] = 32
    seqlen: Annotated[int, typer.Option(min=16, help="Tokens of a window.")] = 512


FormatNames = Annotated[
    list[str] | None,
    typer.Option("--format", help="What will load it: hf, padded or gguf. Given twice: gguf beside one of the others."),
]
GgufTypeFlag = Annotated[GgufType | None, chosen(GgufType, "gguf: how weights are stored", "f16")]


@dataclass(frozen=True)
class ChoiceFlags:
    """Which rates; `rate` None means: as the file of rates has it."""

    rate: Annotated[float | None, typer.Option(help="The pruning rate β.")] = None
    allocate: Annotated[Method | None, chosen(Method, "An allocation without search")] = None
    rates: Annotated[Path | None, typer.Option(help="A search's best.json, or any JSON file with `rates`.")] = None


@dataclass(frozen=True)
class PruningFlags:
    """How rates become a plan; None means: as the file of rates has it, else the default."""

    granularity: Annotated[Granularity | None, typer.Option(help="What a rate applies to.")] = None
    split: Annotated[Split | None, typer.Option(help="How heads and MLP share a layer's rate.")] = None
    multiple_of: Annotated[int | None, typer.Option(min=1, help="MLP widths are multiples of so many channels.")] = None
    importance: Annotated[Importance | None, chosen(Importance, "How heads and channels are scored")] = None
    scoring: Annotated[
        Scoring | None, typer.Option(help="Once on the dense model, or layer by layer on the pruned one.")
    ] = None
    reconstruction: Annotated[
        Reconstruction | None, typer.Option(help="Whether what stays is fitted to make up for what is removed.")
    ] = None


@dataclass(frozen=True)
class MethodFlags:
    """Settings of the allocations."""

    first_layers: Annotated[int | None, typer.Option(min=0, help="llm-pruner: so many at the bottom stay whole.")] = (
        None
    )
    last_layers: Annotated[int | None, typer.Option(min=0, help="llm-pruner: so many at the top stay whole.")] = None
    outlier_threshold: Annotated[float, typer.Option(help="owl: M, how many times the mean an outlier exceeds.")] = 5.0
    outlier_range: Annotated[float, typer.Option(help="owl: λ, how far a layer's rate may be from β.")] = 0.08


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for Typer whose parameters that are dataclasses of this module become one flag per field."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @wraps(command)
    def ungrouped(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    own = [p for name, p in signature(command, eval_str=True).parameters.items() if name not in groups]
    flags = [_flag(group, field) for group in groups.values() for field in fields(group)]
    ungrouped.__signature__ = Signature(own + flags)  # type: ignore[attr-defined]
    ungrouped.__annotations__ = {p.name: p.annotation for p in own + flags}
    return ungrouped


def _flag(group: Any, field: Field[Any]) -> Parameter:
    annotation = get_type_hints(group, include_extras=True)[field.name]
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


FLAG_ERROR: Any = typer.BadParameter.__mro__[1]
"""Click's UsageError. Typer came with Click beside it and has it within since, so it has no name that both know."""


ELSEWHERE = {
    "--heads": (
        "--heads is for `selfpruner evaluate` alone: any heads are masked, and cannot be exported or searched over"
    )
}
"""Options that a person may look for in the wrong command, and why it does not have them."""


def flag_sentence(error: Any) -> str:
    """The error, and where the help is."""
    if hasattr(error, "possibilities") and error.option_name in ELSEWHERE:  # Click's NoSuchOption
        return ELSEWHERE[error.option_name]
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    help_of = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
    return f"{message[:1].lower()}{message[1:]}{help_of}"
