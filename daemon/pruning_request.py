"""`selfpruner allocate | evaluate | export`: from their flags, or a file of rates, to what is pruned and how."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from daemon.settings import check_text, text_spec, validation_sentence
from protocol.allocation import Allocation, Method
from protocol.errors import DataError, SettingsError
from protocol.plan import Split
from protocol.shape import Granularity, ModelShape
from protocol.spec import Importance, Scoring, SearchSpec, TextSpec

NO_RATES = "no JSON object with a list of numbers called `rates`"


@dataclass(frozen=True)
class TextFlags:
    """The texts that the flags name; `data` None means the calibration text."""

    data: str | None
    calibration_data: str | None
    report_data: str | None
    windows: int | None
    calibration_windows: int
    report_windows: int | None
    seqlen: int


@dataclass(frozen=True)
class PruningFlags:
    """How to prune, as the flags say it; None means: as the file of rates has it, else the default."""

    rate: float | None = None
    allocate: Method | None = None
    rates: Path | None = None
    granularity: Granularity | None = None
    split: Split | None = None
    multiple_of: int | None = None
    importance: Importance | None = None
    scoring: Scoring | None = None
    first_layers: int | None = None
    last_layers: int | None = None
    outlier_threshold: float = 5.0
    outlier_range: float = 0.08


@dataclass(frozen=True)
class PruningRequest:
    """What to prune by which rates: given ones, for a model of this `shape`, or those of an allocation."""

    spec: SearchSpec
    choice: tuple[float, ...] | Allocation
    shape: ModelShape | None
    method: str
    """As a person would call it: a method of allocation, or where the rates come from."""


class _StoredSpec(BaseModel):
    """What a file of rates says of how they are meant."""

    model_config = ConfigDict(extra="ignore")

    rate: float | None = None
    granularity: Granularity = "layer"
    split: Split = "equal"
    multiple_of: int = 1
    importance: Importance = "wanda-sp"
    scoring: Scoring = "dense"


class RatesFile(BaseModel):
    """A JSON file with `rates`, such as a search's best.json or what `selfpruner allocate --json` prints."""

    model_config = ConfigDict(extra="ignore")

    rates: tuple[Annotated[float, Strict()], ...]
    shape: ModelShape | None = None
    spec: _StoredSpec = Field(default_factory=_StoredSpec)
    search: str | None = None
    method: str | None = None


def pruning_request(model: str, texts: TextFlags, flags: PruningFlags, *, seed: int) -> PruningRequest:
    """Check the flags together. Raises UsageError with one sentence."""
    if (flags.rates is None) == (flags.allocate is None):
        raise SettingsError("give either --rates FILE or --allocate METHOD with --rate")
    if flags.allocate is not None and flags.rate is None:
        raise SettingsError("--allocate needs --rate, the share of decoder parameters to remove")
    file = read_rates(flags.rates) if flags.rates else None
    stored = _StoredSpec() if file is None else file.spec
    rate = stored.rate if flags.rate is None else flags.rate
    if rate is None:
        raise SettingsError(f"{flags.rates} does not say its pruning rate: give --rate")
    calibration, fitness, report = _texts(texts)
    try:
        spec = SearchSpec(
            model=model,
            rate=rate,
            granularity=flags.granularity or stored.granularity,
            split=flags.split or stored.split,
            multiple_of=flags.multiple_of or stored.multiple_of,
            importance=flags.importance or stored.importance,
            scoring=flags.scoring or stored.scoring,
            calibration=calibration,
            fitness=fitness,
            report=report,
            seed=seed,
        )
        allocation = None if flags.allocate is None else _allocation(flags.allocate, flags)
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from error
    if file is None:
        assert allocation is not None
        return PruningRequest(spec, allocation, None, allocation.method)
    return PruningRequest(spec, file.rates, file.shape, _origin(file, flags.rates))


def read_rates(path: Path) -> RatesFile:
    """Read a file of rates. Raises DataError where it is none."""
    try:
        return RatesFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"the rates file {str(path)!r} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path} is {NO_RATES} ({place}: {first['msg']})") from error
    except ValueError as error:
        raise DataError(f"{path} is {NO_RATES} ({error})") from error


def measured_text(texts: TextFlags) -> TextSpec:
    """The one text that a model is measured on as it is."""
    for flag, given in (("--calibration-data", texts.calibration_data), ("--report-data", texts.report_data)):
        if given is not None:
            raise SettingsError(f"{flag} is for pruning: give --allocate or --rates too")
    if texts.data is None:
        raise SettingsError("give --data, the text to measure on")
    return _text(texts.data, texts.windows, texts.seqlen)


def _texts(texts: TextFlags) -> tuple[TextSpec, TextSpec, TextSpec | None]:
    calibration = texts.calibration_data or texts.data
    data = texts.data or texts.calibration_data
    if calibration is None or data is None:
        raise SettingsError("give --data, the text to measure on")
    report = texts.report_data and _text(texts.report_data, texts.report_windows, texts.seqlen)
    return (
        _text(calibration, texts.calibration_windows, texts.seqlen),
        _text(data, texts.windows, texts.seqlen),
        report or None,
    )


def _allocation(method: Method, flags: PruningFlags) -> Allocation:
    return Allocation(
        method=method,
        first_layers=flags.first_layers,
        last_layers=flags.last_layers,
        outlier_threshold=flags.outlier_threshold,
        outlier_range=flags.outlier_range,
    )


def _origin(file: RatesFile, path: Path | None) -> str:
    if file.search is not None:
        return f"search {file.search}"
    return file.method or f"rates of {path.name if path else 'a file'}"


def _text(source: str, windows: int | None, seqlen: int) -> TextSpec:
    check_text(source)
    return text_spec(source, windows, seqlen)
