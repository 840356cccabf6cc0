"""`selfpruner evaluate`: from its flags to the spec that is measured, without a search."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from daemon.settings import check_text, text_spec, validation_sentence
from protocol.errors import DataError, SettingsError
from protocol.spec import SearchSpec, TextSpec


@dataclass(frozen=True)
class EvaluationRequest:
    """What to prune and measure; `rates` None means the uniform allocation."""

    spec: SearchSpec
    rates: tuple[float, ...] | None


def evaluation_request(
    *,
    model: str,
    data: str,
    calibration_data: str | None,
    rate: float | None,
    allocate: str | None,
    rates_file: Path | None,
    windows: int | None,
    calibration_windows: int,
    seqlen: int,
    seed: int,
) -> EvaluationRequest:
    """Check the flags together. Raises UsageError with one sentence."""
    if (rates_file is None) == (allocate is None):
        raise SettingsError("give either --rates FILE or --allocate uniform with --rate")
    if allocate is not None and rate is None:
        raise SettingsError("--allocate needs --rate, the share of decoder parameters to remove")
    chosen = read_rates(rates_file) if rates_file else {}
    stored = chosen.get("spec", {})
    if rates_file is not None and rate is None and "rate" not in stored:
        raise SettingsError(f"{rates_file} does not say its pruning rate: give --rate")
    try:
        spec = SearchSpec(
            model=model,
            rate=stored["rate"] if rate is None else rate,
            granularity=stored.get("granularity", "layer"),
            split=stored.get("split", "equal"),
            multiple_of=stored.get("multiple_of", 1),
            calibration=_text(calibration_data or data, calibration_windows, seqlen),
            fitness=_text(data, windows, seqlen),
            seed=seed,
        )
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from error
    return EvaluationRequest(spec, tuple(chosen["rates"]) if rates_file else None)


def read_rates(path: Path) -> dict[str, Any]:
    """A JSON file with `rates`, such as a search's best.json; its `spec`, if any, says what they apply to."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        rates = record["rates"]
        if not isinstance(rates, list) or not all(type(r) in (int, float) for r in rates):
            raise TypeError("`rates` is no list of numbers")
    except OSError as error:
        raise DataError(f"the rates file {str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no JSON object with a list of numbers called `rates` ({error})") from error
    assert isinstance(record, dict)
    return record


def _text(source: str, windows: int | None, seqlen: int) -> TextSpec:
    check_text(source)
    return text_spec(source, windows, seqlen)
