"""What state the LLM is in: values that people and other processes are shown."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Degraded = Literal["endpoints", "budget"]
"""Why the classical operators stand in: no endpoint answers, or the budget is used up."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class EndpointState(_Value):
    """One endpoint: asked as usual (`closed`), left alone (`open`), or being tried (`half-open`)."""

    name: str
    state: Literal["closed", "open", "half-open"]
    reason: str | None = None
    """Why it is not `closed`: what it did last."""


class LlmState(_Value):
    """All endpoints in their order."""

    degraded: Degraded | None = None
    reason: str | None = None
    """In words, where degraded."""
    endpoints: tuple[EndpointState, ...] = ()
