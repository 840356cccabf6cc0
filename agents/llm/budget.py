"""What the LLM may cost, and whether it has. Pure."""

from dataclasses import dataclass

from protocol.errors import EndpointError


class BudgetUsedUp(EndpointError):  # noqa: N818  (nothing broke)
    """The LLM is asked no more, by any endpoint."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the LLM's budget is used up: {what}", retryable=False)


@dataclass(frozen=True)
class Spent:
    """What the LLM has cost so far; `cost` in the unit of the endpoints' prices."""

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
    """What the LLM may cost; None is no limit."""

    requests: int | None = None
    """HTTP requests, those that are tried again included."""
    tokens: int | None = None
    """Of prompts and answers together."""
    cost: float | None = None

    def used_up(self, spent: Spent) -> str | None:
        """Which limit is reached, in words; None while there is room."""
        tokens = spent.prompt_tokens + spent.completion_tokens
        if self.requests is not None and spent.requests >= self.requests:
            return f"{spent.requests} of {self.requests} requests (llm.budget_requests)"
        if self.tokens is not None and tokens >= self.tokens:
            return f"{tokens} of {self.tokens} tokens (llm.budget_tokens)"
        if self.cost is not None and spent.cost >= self.cost:
            return f"{spent.cost:.4g} of {self.cost:g} in cost (llm.budget_cost)"
        return None
