"""The budget of the LLM: requests, tokens and cost. Pure."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Budget:
    """Limits of a search; None is no limit."""

    requests: int | None = None
    """HTTP requests, including retries."""
    tokens: int | None = None
    """Tokens of prompts and answers together."""
    cost: float | None = None

    def used_up(self, spent: Spent) -> str | None:
        """Return the limit that is reached, in words; None if none is."""
        tokens = spent.prompt_tokens + spent.completion_tokens
        if self.requests is not None and spent.requests >= self.requests:
            return f"{spent.requests} of {self.requests} requests (llm.budget_requests)"
        if self.tokens is not None and tokens >= self.tokens:
            return f"{tokens} of {self.tokens} tokens (llm.budget_tokens)"
        if self.cost is not None and spent.cost >= self.cost:
            return f"{spent.cost:.4g} of {self.cost:g} in cost (llm.budget_cost)"
        return None
