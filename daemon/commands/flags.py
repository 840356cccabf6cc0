"""Flags shared by several commands: single flags, and groups that a command receives as one value."""

import os
from collections.abc import Callable
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from daemon.settings.errors import in_plain_words
from protocol.plans.allocation import Method
from protocol.plans.plan import Split
from protocol.plans.shape import Granularity
from protocol.plans.spec import Dtype, Importance, Reconstruction, Scoring
from protocol.queue.connection import with_password
from protocol.results.formats import GgufType
from protocol.runtime.paths import expanded


def chosen(choice: Any, what: str, when_left_out: str = "") -> Any:
    """Return an option that lists its choices in its help text, because the column of types is too narrow for them."""
    values = ", ".join(f"{one} (default)" if one == when_left_out else one for one in get_args(choice))
    return typer.Option(metavar="<choice>", help=f"{what}: {values}.")


Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, such as target.rate=0.3; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
SearchName = Annotated[str, typer.Option("--search", help="Name of the search.")]
WhichSearch = Annotated[
    str | None, typer.Option("--search", help="Name of the search; by default the only one in --folder, or `default`.")
]
PASSWORD_FILE = "SELFPRUNER_REDIS__PASSWORD_FILE"


def _with_password(url: str | None) -> str | None:
    """Return the URL with the password from the file that the daemon uses, so that no other flag is needed."""
    file = os.environ.get(PASSWORD_FILE)
    return with_password(url, Path(file)) if url and file else url


RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        envvar="SELFPRUNER_REDIS__URL",
        help="Redis server; by default the search's own. For password files see the guide many-machines.md.",
        callback=_with_password,
    ),
]
RedisPasswordFile = Annotated[
    Path | None,
    typer.Option("--redis-password-file", envvar=PASSWORD_FILE, help="File with the password of --redis-url."),
]


def expanded_if_given(path: Path | None) -> Path | None:
    """Return the path with a leading ~ expanded; None if the option was not given."""
    return None if path is None else expanded(path)


Folder = Annotated[
    Path,
    typer.Option(
        "--folder",
        envvar="SELFPRUNER_RUN__FOLDER",
        show_envvar=False,  # its name is too long for eighty columns
        help="Folder of the searches (run.folder).",
        callback=expanded,
    ),
]

Model = Annotated[str | None, typer.Option(help="A Hugging Face name, a folder, a GGUF file, or `smollm2`.")]


def seed_of_torch(value: int | None) -> int | None:
    """Return the seed if torch accepts it. (With a `max`, Typer would print that limit in the column of types.)"""
    if value is not None and value >= 2**63:
        raise typer.BadParameter(f"{value} is not in the range 0<=x<2**63.")
    return value


Seed = Annotated[int, typer.Option(min=0, callback=seed_of_torch, help="Seed of the text windows.")]
DtypeFlag = Annotated[Dtype, chosen(Dtype, "Data type of weights and activations")]


@dataclass(frozen=True)
class TextFlags:
    """The texts."""

    data: Annotated[str | None, typer.Option(help="Text to measure on: `wikitext2`, `c4`, `self`, or a text file.")] = (
        None
    )
    calibration_data: Annotated[str | None, typer.Option(help="Text to score on; --data by default.")] = None
    report_data: Annotated[str | None, typer.Option(help="Second text to measure on, such as a held-out one.")] = None
    windows: Annotated[int | None, typer.Option(min=1, help="Windows of --data; all by default.")] = None
    calibration_windows: Annotated[int, typer.Option(min=1, help="Windows of --calibration-data.")] = 32
    report_windows: Annotated[int | None, typer.Option(min=1, help="Windows of --report-data; all by default.")] = None
    seqlen: Annotated[
        int, typer.Option(min=16, help="Tokens per window; for a folder by default as on its model card.")
    ] = 2048


@dataclass(frozen=True)
class ExportTexts(TextFlags):
    """The texts of an export, which scores and measures the model even if no text is named."""

    windows: Annotated[int | None, typer.Option(min=1, help="Windows of --data.")] = 8
    seqlen: Annotated[int, typer.Option(min=16, help="Tokens of a window.")] = 512


@dataclass(frozen=True)
class CalibrationFlags:
    """The text to score on."""

    calibration_data: Annotated[
        str, typer.Option(help="Text to score on: `wikitext2`, `c4`, `self`, or a text file.")
    ] = "self"
    calibration_windows: Annotated[int, typer.Option(min=1, help="Windows of --calibration-data.")] = 32
    seqlen: Annotated[int, typer.Option(min=16, help="Tokens of a window.")] = 512


FormatNames = Annotated[
    list[str] | None,
    typer.Option("--format", help="hf (default), padded or gguf; repeat it for gguf beside one of the others."),
]
GgufTypeFlag = Annotated[GgufType | None, chosen(GgufType, "Weight type of a GGUF file", "f16")]


@dataclass(frozen=True)
class ChoiceFlags:
    """The source of the rates. `rate` None means the rate in the file of rates."""

    rate: Annotated[float | None, typer.Option(help="Pruning rate β: the share of decoder parameters to remove.")] = (
        None
    )
    allocate: Annotated[Method | None, chosen(Method, "Allocation method, without a search")] = None
    rates: Annotated[
        Path | None,
        typer.Option(
            help="File of rates: a search's best.json, or any JSON file with `rates`.", callback=expanded_if_given
        ),
    ] = None


@dataclass(frozen=True)
class PruningFlags:
    """How rates become a plan. None means the value in the file of rates, or else the default."""

    granularity: Annotated[Granularity | None, typer.Option(help="What a rate applies to; `layer` by default.")] = None
    split: Annotated[
        Split | None, typer.Option(help="How attention and MLP share a layer's rate; `equal` by default.")
    ] = None
    multiple_of: Annotated[int | None, typer.Option(min=1, help="Round MLP widths to multiples of this.")] = None
    importance: Annotated[Importance | None, chosen(Importance, "How heads and channels are scored", "wanda-sp")] = None
    scoring: Annotated[
        Scoring | None,
        typer.Option(help="Score once on the dense model (default), or layer by layer on the pruned one."),
    ] = None
    reconstruction: Annotated[
        Reconstruction | None,
        typer.Option(help="Fit the remaining weights to the dense blocks' outputs; `none` by default."),
    ] = None


@dataclass(frozen=True)
class MethodFlags:
    """Options of the allocation methods."""

    first_layers: Annotated[
        int | None, typer.Option(min=0, help="llm-pruner: number of first layers to leave unpruned.")
    ] = None
    last_layers: Annotated[
        int | None, typer.Option(min=0, help="llm-pruner: number of last layers to leave unpruned.")
    ] = None
    outlier_threshold: Annotated[float, typer.Option(help="owl: M, an outlier exceeds M times the mean.")] = 5.0
    rule: Annotated[
        str | None,
        typer.Option(help="rule: `default`, a file with a rule or a search's rules.json, or the rule itself."),
    ] = None
    outlier_range: Annotated[float, typer.Option(help="owl: λ, the largest distance of a layer's rate from β.")] = 0.08


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command for Typer in which each parameter that is a dataclass becomes one flag per field."""
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
"""Click's UsageError. Old versions of Typer depend on Click and new ones contain it, so no import works for both."""


ELSEWHERE = {
    "--heads": (
        "--heads is for `selfpruner evaluate` only: such heads are masked, and cannot be exported or searched over"
    )
}
"""Flags that are often given to the wrong command, and why it does not have them."""


def flag_sentence(error: Any) -> str:
    """Return an error of the command line as a sentence, with the command that shows the help."""
    if hasattr(error, "possibilities") and error.option_name in ELSEWHERE:  # Click's NoSuchOption
        return ELSEWHERE[error.option_name]
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    message = in_plain_words(message)
    help_of = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
    return f"{message[:1].lower()}{message[1:]}{help_of}"
