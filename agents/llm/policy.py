"""Retries, limits and rests of the endpoints, and the budget of a search. Pure."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from protocol.errors import EndpointError


class BudgetUsedUp(EndpointError):  # noqa: N818  (nothing broke)
    """A limit of the budget is reached: no endpoint is asked any more."""

    def __init__(self, limit: str) -> None:
        super().__init__(f"the LLM's budget is used up: {limit}", retryable=False)


@dataclass(frozen=True)
class Spent:
    """Totals so far; `cost` is in the currency of the endpoints' prices."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost + other.cost,
        )


class ChatPolicy(BaseModel):
    """How endpoints are asked; the fields are settings `llm.*`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    connect_timeout: ClassVar[float] = 10.0
    """Time limit in seconds for a connection and for a readiness check."""
    first_wait: ClassVar[float] = 0.5
    """Longest wait in seconds before the second attempt; it doubles with each further attempt."""
    longest_wait: ClassVar[float] = 20.0
    """Longest wait in seconds between attempts. If an endpoint asks for more, the next endpoint is asked instead."""
    longest_rest: ClassVar[float] = 600.0
    """Longest rest of an endpoint in seconds."""

    attempts: PositiveInt = 4
    """Maximum number of HTTP attempts per question and endpoint."""
    deadline_seconds: PositiveFloat = 300.0
    """Time limit in seconds for one question to one endpoint, including retries."""
    max_reply_bytes: PositiveInt = 1_000_000
    """Maximum size of an HTTP reply in bytes; a longer one is refused."""
    concurrency: PositiveInt = 4
    """Maximum number of concurrent questions per endpoint."""
    failures_to_open: PositiveInt = 4
    """Number of consecutive failed requests after which an endpoint is marked down."""
    rest_seconds: PositiveFloat = 30.0
    """Seconds that an endpoint rests after it is marked down. One probe follows, and each failed probe doubles the
    rest, up to ten minutes."""
    budget_requests: PositiveInt | None = None
    """Maximum number of HTTP requests, including retries, summed over restarts; after that operators without an LLM
    propose. None means no limit."""
    budget_tokens: PositiveInt | None = None
    """Maximum number of tokens, prompts and replies together, summed over restarts. None means no limit."""
    budget_cost: PositiveFloat | None = None
    """Maximum cost, in the currency of the endpoints' price_in and price_out, summed over restarts. None means no
    limit."""

    def used_up(self, spent: Spent) -> str | None:
        """Return the limit of the budget that is reached, in words; None if no limit is reached."""
        tokens = spent.prompt_tokens + spent.completion_tokens
        if self.budget_requests is not None and spent.requests >= self.budget_requests:
            return f"{spent.requests} of {self.budget_requests} requests (llm.budget_requests)"
        if self.budget_tokens is not None and tokens >= self.budget_tokens:
            return f"{tokens} of {self.budget_tokens} tokens (llm.budget_tokens)"
        if self.budget_cost is not None and spent.cost >= self.budget_cost:
            return f"{spent.cost:.4g} of {self.budget_cost:g} in cost (llm.budget_cost)"
        return None
