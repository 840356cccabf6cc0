"""An LLM endpoint, how it is asked, and what it answered: values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, SecretStr

from agents.llm.budget import Spent

Message = Mapping[str, str]


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint: `base_url` ends in `/v1`, and `api_key` goes to it and nowhere else."""

    name: str
    base_url: str
    model: str
    api_key: SecretStr | None = None
    price_in: float = 0.0
    """Of a million tokens of prompts, in any currency, the same for all endpoints."""
    price_out: float = 0.0
    """Of a million tokens of answers."""
    context: int | None = None
    """Tokens of a question with its answer, where it is known."""
    grammar: bool = False
    """Whether it takes llama.cpp's grammars."""


@dataclass(frozen=True)
class ChatPolicy:
    """How long and how often an endpoint is tried. Times in seconds."""

    attempts: int = 4
    """HTTP requests for one question, as long as they fail in a way that may pass."""
    deadline: float = 120.0
    """For one question to one endpoint, all its attempts together; waiting at the gate is not counted."""
    connect_timeout: float = 10.0
    byte_cap: int = 2 * 1024 * 1024
    concurrency: int = 4
    """Questions that one endpoint answers at a time."""
    first_wait: float = 0.5
    """Before the second attempt, at most; it doubles with each."""
    longest_wait: float = 20.0
    """Between attempts. For a longer one that an endpoint asks for, the next endpoint is asked instead."""
    failures_to_open: int = 4
    """So many requests in a row without an answer, and the endpoint is left alone."""
    rest: float = 30.0
    """For how long, at first; it doubles with each probe that fails."""
    longest_rest: float = 600.0


@dataclass(frozen=True)
class Answer:
    """What an endpoint answered."""

    text: str
    endpoint: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    finish_reason: str

    @property
    def truncated(self) -> bool:
        """Whether the token limit cut it off, be it inside its reasoning."""
        return self.finish_reason == "length"


@dataclass
class Usage:
    """Running totals of one endpoint. `requests` counts HTTP requests, retries included."""

    requests: int = 0
    answers: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def spent(self, endpoint: Endpoint) -> Spent:
        """What that is at the endpoint's prices."""
        cost = (self.prompt_tokens * endpoint.price_in + self.completion_tokens * endpoint.price_out) / 1e6
        return Spent(self.requests, self.prompt_tokens, self.completion_tokens, cost)


@dataclass(frozen=True)
class Question:
    """What is asked: the conversation so far, the form of the answer, and how it is sampled."""

    messages: Sequence[Message]
    schema: dict[str, object] | None
    schema_name: str
    seed: int
    temperature: float
    max_tokens: int


class Asks(Protocol):
    """What the agents need of Chat."""

    async def ask(
        self,
        messages: Sequence[Message],
        *,
        schema: dict[str, object] | None,
        schema_name: str,
        seed: int,
        temperature: float,
        max_tokens: int,
        label: str = "",
    ) -> Answer:
        """The answer; raises EndpointError when no endpoint gives one."""
        ...


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
