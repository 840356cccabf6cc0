"""Settings of the target model and of the texts it is measured on."""

from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt

from daemon.settings.section import Section
from protocol.errors import DataError
from protocol.plans.rates import DECIMALS
from protocol.plans.spec import NAMED_TEXTS, Dtype, TextSpec
from protocol.runtime.paths import expanded


def _five_decimals(rate: float) -> float:
    if round(rate, DECIMALS) != rate:
        raise ValueError(f"give it at most {DECIMALS} decimals")
    return rate


class TargetSettings(Section):
    """The model to prune, and how far."""

    model: str = Field(min_length=1)
    """A hub name, a folder, or `smollm2`."""
    rate: Annotated[float, AfterValidator(_five_decimals)] = Field(gt=0, le=0.9)
    """β: the share of decoder-layer parameters to remove, above 0 and up to 0.9."""
    multiple_of: PositiveInt = 1
    """MLP widths are multiples of this many channels (64 or 128 suits tensor cores)."""
    dtype: Dtype = "bfloat16"
    """Of weights and activations."""


class DataSettings(Section):
    """The texts: scored on, searched on, reported on. Each is `wikitext2`, `c4`, `self`, or a text file."""

    calibration: str = "wikitext2"
    """The text that importance is scored on."""
    calibration_windows: PositiveInt = 128
    """Windows of it."""
    fitness: str = "wikitext2"
    """The text that candidates are measured on."""
    fitness_windows: PositiveInt | None = None
    """Windows of it; none means the whole text."""
    report: str | None = None
    """A third text, which dense, uniform and best are measured on at the end."""
    report_windows: PositiveInt | None = None
    """Windows of it; none means the whole text."""
    seqlen: int = Field(default=2048, ge=16)
    """Tokens of a window."""


def text_spec(source: str, windows: int | None, seqlen: int) -> TextSpec:
    """A named text, or a file by its absolute path: a worker may run in another folder."""
    path = source if source in NAMED_TEXTS else str(expanded(source).absolute())
    return TextSpec(source=path, windows=windows, seqlen=seqlen)


def check_text(source: str) -> None:
    """Raise DataError where a text is a file that is not on this machine."""
    if source not in NAMED_TEXTS and not expanded(source).is_file():
        raise DataError(f"there is no text file {source!r}; give a file, or one of {', '.join(NAMED_TEXTS)}")
