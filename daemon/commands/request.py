"""Pruning requests: from the flags of a command, or a file of rates, to a spec and rates."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from daemon.commands.flags import CalibrationFlags, ChoiceFlags, ExportTexts, MethodFlags, PruningFlags, TextFlags
from daemon.settings.errors import validation_sentence
from daemon.settings.rules import read_rule
from daemon.settings.target import check_lengths, check_text, text_spec
from protocol.errors import DataError, SettingsError
from protocol.plans.allocation import Allocation, Method, PruningRequest
from protocol.plans.any_heads import Heads
from protocol.plans.plan import Split
from protocol.plans.shape import Granularity, ModelShape
from protocol.plans.spec import Dtype, Importance, Measure, Reconstruction, Role, Scoring, SearchSpec, TextSpec
from protocol.runtime.paths import check_model

NO_RATES = "not a JSON object with a list of numbers called `rates`"


class _HowStored(BaseModel):
    """The pruning settings stored in a file of rates."""

    model_config = ConfigDict(extra="ignore")

    rate: float | None = None
    granularity: Granularity = "layer"
    split: Split = "equal"
    multiple_of: int = 1
    importance: Importance = "wanda-sp"
    scoring: Scoring = "dense"
    reconstruction: Reconstruction = "none"


class RatesFile(BaseModel):
    """A JSON file with `rates`, such as a search's best.json or what `selfpruner allocate --json` prints."""

    model_config = ConfigDict(extra="ignore")

    rates: tuple[Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)], ...]
    shape: ModelShape | None = None
    spec: _HowStored = Field(default_factory=_HowStored)
    search: str | None = None
    method: str | None = None


def pruning_request(
    model: str,
    texts: TextFlags | CalibrationFlags,
    choice: ChoiceFlags,
    how: PruningFlags,
    options: MethodFlags,
    *,
    measure: Measure = "perplexity",
    dtype: Dtype,
    seed: int,
) -> PruningRequest:
    """Return a request from the flags. Raises UsageError with one sentence if they contradict each other."""
    if (choice.rates is None) == (choice.allocate is None):
        raise SettingsError("give either --rates FILE or --allocate METHOD with --rate")
    if choice.allocate is not None and choice.rate is None:
        raise SettingsError("--allocate needs --rate, the share of decoder parameters to remove")
    refuse_unread(choice.allocate, options)
    file = RatesFile(rates=()) if choice.rates is None else read_rates(choice.rates)
    given = {"rate": choice.rate, **asdict(how)}
    pruning = file.spec.model_dump() | {name: value for name, value in given.items() if value is not None}
    if pruning["rate"] is None:
        raise SettingsError(f"{choice.rates} does not contain its pruning rate: give --rate")
    check_model(model)  # now, because torch takes seconds to import
    spec = _spec(model=model, **pruning, **_texts(texts), measure=measure, dtype=dtype, seed=seed)
    check_lengths({"calibration": spec.calibration} if isinstance(texts, CalibrationFlags) else spec.texts)
    if choice.allocate is not None:
        return PruningRequest(spec, allocation_of(choice.allocate, options), None, choice.allocate)
    return PruningRequest(spec, file.rates, file.shape, _origin(file, choice.rates))


def request_of_search(record: dict[str, Any], origin: str) -> PruningRequest:
    """Return the request for a search's best.json: the same model, texts and seed, and therefore the same weights.

    `origin` describes where the rates come from. Raises DataError for a record of an older version.
    """
    try:
        spec = SearchSpec.model_validate(record["spec"])
        file = RatesFile.model_validate(record)
    except (KeyError, ValidationError) as error:
        raise DataError(
            "the search's best rates were saved by another version of Self-Pruner: run a new search"
        ) from error
    return PruningRequest(spec, file.rates, file.shape, origin)


def allocation_spec(
    model: str, rate: float, texts: CalibrationFlags, how: PruningFlags, *, dtype: Dtype, seed: int
) -> SearchSpec:
    """Return the spec of an allocation, which scores weights on one text and measures nothing."""
    pruning = {name: value for name, value in asdict(how).items() if value is not None}
    spec = _spec(model=model, rate=rate, **pruning, **_texts(texts), dtype=dtype, seed=seed)
    check_lengths({"calibration": spec.calibration})
    return spec


_READ_BY = {
    "first_layers": "llm-pruner",
    "last_layers": "llm-pruner",
    "outlier_threshold": "owl",
    "outlier_range": "owl",
    "rule": "rule",
}


def refuse_unread(chosen: Method | None, options: MethodFlags) -> None:
    """Raise SettingsError for an option of a method other than the chosen one."""
    for name, method in _READ_BY.items():
        if getattr(options, name) != getattr(MethodFlags(), name) and chosen != method:
            raise SettingsError(f"--{name.replace('_', '-')} is for the allocation {method}")


NEEDED_BY_ANY_HEADS = {"granularity": "layer", "split": "equal", "scoring": "dense"}
"""The settings of Wanda-sp: one rate per layer, the same for heads and MLP, and scores of the dense model."""


def check_heads(heads: Heads | None, spec: SearchSpec) -> None:
    """Raise SettingsError if the spec does not allow removing any query heads."""
    for name, value in NEEDED_BY_ANY_HEADS.items():
        if heads == "any" and (given := getattr(spec, name)) != value:
            raise SettingsError(f"--heads any needs --{name} {value}, not {given!r}: it removes heads as Wanda-sp does")


def refuse_given(why: str, *groups: object) -> None:
    """Raise SettingsError if any flag of these groups is set, because it would have no effect."""
    for group in groups:
        for field in fields(group):  # type: ignore[arg-type]
            if getattr(group, field.name) != field.default:
                raise SettingsError(f"--{field.name.replace('_', '-')} has no effect here: {why}")


def allocation_of(method: Method, options: MethodFlags) -> Allocation:
    """Return the allocation from the flags. Raises UsageError for an option out of range or an invalid rule."""
    try:
        rule = read_rule(options.rule or "default")
        return Allocation(method=method, **{**asdict(options), "rule": rule})
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from error


def read_rates(path: Path) -> RatesFile:
    """Read a file of rates. Raises DataError if it cannot be read, or contains no valid `rates`."""
    if path.exists() and not path.is_file():
        raise DataError(f"the rates file {str(path)!r} is not a file")
    try:
        return RatesFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"the rates file {str(path)!r} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path} is {NO_RATES} ({place}: {first['msg']})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is {NO_RATES} ({error})") from error


def measured_texts(texts: TextFlags) -> dict[Role, TextSpec]:
    """Return the texts for measuring a model unchanged. --calibration-data is only given to exclude its windows."""
    if texts.data is None:
        raise SettingsError("give --data, the text to measure on")
    calibration = texts.calibration_data
    found: dict[Role, TextSpec] = {"fitness": text_of(texts.data, texts.windows, texts.seqlen)}
    if calibration is not None:
        found["calibration"] = text_of(calibration, texts.calibration_windows, texts.seqlen)
    if texts.report_data is not None:
        found["report"] = text_of(texts.report_data, texts.report_windows, texts.seqlen)
    check_lengths(found)
    return found


def self_if_none(texts: ExportTexts) -> ExportTexts:
    """Return the same texts, or text that the model generates if no text is named."""
    return texts if texts.data or texts.calibration_data else replace(texts, calibration_data="self")


def _texts(texts: TextFlags | CalibrationFlags) -> dict[str, TextSpec | None]:
    if isinstance(texts, CalibrationFlags):
        text = text_of(texts.calibration_data, texts.calibration_windows, texts.seqlen)
        # No fitness text is read, because nothing is measured, but a spec needs one.
        return {"calibration": text, "fitness": text, "report": None}
    calibration = texts.calibration_data or texts.data
    data = texts.data or texts.calibration_data
    if calibration is None or data is None:
        raise SettingsError("give --data, the text to measure on")
    report = texts.report_data and text_of(texts.report_data, texts.report_windows, texts.seqlen)
    return {
        "calibration": text_of(calibration, texts.calibration_windows, texts.seqlen),
        "fitness": text_of(data, texts.windows, texts.seqlen),
        "report": report or None,
    }


def _spec(**fields: Any) -> SearchSpec:
    try:
        return SearchSpec(**fields)
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from error


def _origin(file: RatesFile, path: Path | None) -> str:
    if file.search is not None:
        return f"search {file.search}"
    return file.method or f"rates of {path.name if path else 'a file'}"


def text_of(source: str, windows: int | None, seqlen: int) -> TextSpec:
    """Return the spec of a text. Raises DataError for a file that is not on this machine."""
    check_text(source)
    return text_spec(source, windows, seqlen)
