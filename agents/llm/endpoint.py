"""Endpoints, questions and answers: values, and the protocol ChatClient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, SecretStr

from agents.llm.policy import Spent

Message = Mapping[str, str]
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Hosts that are this machine."""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint. `base_url` ends in `/v1`; `api_key` is sent to it and nowhere else."""

    name: str
    base_url: str
    model: str
    api_key: SecretStr | None = None
    price_in: float = 0.0
    """Price of a million prompt tokens, in any currency that is the same for all endpoints."""
    price_out: float = 0.0
    """Price of a million tokens of answers."""
    context: int | None = None
    """Context size in tokens (question and answer together), if known."""
    grammar: bool = False
    """Whether the endpoint accepts llama.cpp's grammars."""


@dataclass(frozen=True)
class Answer:
    """The answer of an endpoint."""

    text: str
    endpoint: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    finish_reason: str

    @property
    def truncated(self) -> bool:
        """Whether the token limit cut the answer off, in its text or in its reasoning."""
        return self.finish_reason == "length"


@dataclass
class Usage:
    """Running totals of one endpoint. `requests` counts HTTP requests, retries included.

    `seconds` is the time that answers took, with their retries.
    """

    requests: int = 0
    answers: int = 0
    seconds: float = 0.0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def spent(self, endpoint: Endpoint) -> Spent:
        """Return the totals with their cost at the endpoint's prices."""
        cost = (self.prompt_tokens * endpoint.price_in + self.completion_tokens * endpoint.price_out) / 1e6
        return Spent(self.requests, self.prompt_tokens, self.completion_tokens, cost)


@dataclass(frozen=True)
class Question:
    """A question to the LLM: the conversation so far, the schema of the answer, and the sampling parameters."""

    messages: Sequence[Message]
    schema: dict[str, object] | None
    """JSON schema of the answer; None for free text."""
    schema_name: str
    seed: int
    temperature: float
    max_tokens: int
    label: str = ""
    """Agent, round, call and attempt: identifies the question in the transcript."""


class ChatClient(Protocol):
    """Answers the questions of agents: Chat, or a replay of a transcript."""

    async def ask(self, question: Question) -> Answer:
        """Return the answer; raise EndpointError if there is none."""
        ...


Degraded = Literal["endpoints", "budget"]
"""Why the fallback proposes: no endpoint answers, or the budget is used up."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class EndpointState(_Value):
    """The circuit breaker of one endpoint: asked as usual (`closed`), resting (`open`) or probed (`half-open`)."""

    name: str
    state: Literal["closed", "open", "half-open"]
    reason: str | None = None
    """The last failure, if the state is not `closed`."""


class Awaited(_Value):
    """The endpoints that a search waits for at its start."""

    reason: str
    """Their names, and why they do not answer."""
    until: datetime | None
    """When the search begins without an LLM, in UTC; None if it waits for ever."""


class LlmState(_Value):
    """The states of all endpoints, in their order, and whether the fallback proposes."""

    awaited: Awaited | None = None
    """The endpoints that questions wait for; None if one has answered, or if no question waits."""

    degraded: Degraded | None = None
    reason: str | None = None
    """Why the fallback proposes, as a sentence."""
    endpoints: tuple[EndpointState, ...] = ()
