"""An LLM endpoint, how it is asked, and what it answered: values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import SecretStr

Message = Mapping[str, str]


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint: `base_url` ends in `/v1`, and `api_key` goes to it and nowhere else."""

    name: str
    base_url: str
    model: str
    api_key: SecretStr | None = None


@dataclass(frozen=True)
class ChatPolicy:
    """How long and how often an endpoint is tried. Times in seconds."""

    attempts: int = 5
    deadline: float = 120.0
    """For one question to one endpoint, all its attempts together; waiting at the gate is not counted."""
    connect_timeout: float = 10.0
    byte_cap: int = 2 * 1024 * 1024
    concurrency: int = 4
    """Questions that one endpoint answers at a time."""
    first_wait: float = 0.5
    longest_wait: float = 20.0
    rest: float = 30.0
    """How long an endpoint that is down is left alone, so that the stand-ins go on without waiting for it."""
    failures_to_rest: int = 3
    """So many failed questions in a row also count as down; one alone may be the question's fault."""


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


@dataclass(frozen=True)
class Question:
    """What is asked: the conversation so far, the form of the answer, and how it is sampled."""

    messages: Sequence[Message]
    schema: dict[str, object] | None
    schema_name: str
    seed: int
    temperature: float
    max_tokens: int
