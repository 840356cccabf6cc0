"""Base classes of values, which are frozen and refuse unknown fields."""

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen value. An unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FiniteValue(Value):
    """A value whose numbers are finite: NaN and infinity are errors."""

    model_config = ConfigDict(allow_inf_nan=False)
