"""The size that a pruned model may have: its parameters, or its memory with a KV cache."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from protocol.plans.value import Value

_PARAMETERS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_BYTES = {"B": 1} | {
    f"{letter}{unit}": base**power
    for unit, base in (("B", 1000), ("IB", 1024))
    for power, letter in enumerate("KMGT", start=1)
}


def _read(value: object, units: dict[str, int], example: str) -> object:
    """Return the number that a text with a unit means."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    if found is None or found[2].upper() not in units:
        raise ValueError(f"write a number and a unit, such as {example}")
    return int(float(found[1]) * units[found[2].upper()])


Parameters = Annotated[int, Field(gt=0), BeforeValidator(lambda value: _read(value, _PARAMETERS, "5B or 100M"))]
"""A number of parameters: 5B is five billion."""
Memory = Annotated[int, Field(gt=0), BeforeValidator(lambda value: _read(value, _BYTES, "10GB or 170MB"))]
"""Bytes: 10GB are 10 · 1000³, and 10GiB are 10 · 1024³."""


class Size(Value):
    """The size that a pruned model may have at most; exactly one of `parameters` and `memory`."""

    parameters: Parameters | None = None
    memory: Memory | None = None
    """Bytes of all weights, and of the KV cache of `batch` texts of `context` tokens."""
    context: int = Field(default=0, ge=0)
    batch: PositiveInt = 1

    @model_validator(mode="after")
    def _is_one(self) -> "Size":
        if (self.parameters is None) == (self.memory is None):
            raise ValueError("give parameters or memory, not both")
        return self

    @property
    def words(self) -> str:
        """Describe the size."""
        if self.memory is not None:
            cache = f" with a KV cache of {self.batch:,} × {self.context:,} tokens" if self.context else ""
            return f"{self.memory / 1e6:,.0f} MB{cache}"
        return f"{self.parameters:,} parameters"
