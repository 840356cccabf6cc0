"""How the agents ask the LLM."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

ReplyFormat = Literal["lists", "edits", "trades"]
"""`lists`: whole configurations (the paper). `edits`: a profile, a few changes, a mix; a tenth of the tokens. `trades`:
a profile, then choices from what a surrogate ranks: a hundredth."""

Told = Literal["sensitivity", "weakest", "contrast", "lessons"]
"""What the LLM may be told: the units that hurt most and least when pruned alone; those of the best configuration that
would gain most from less pruning, and lose least from more; how good configurations differ from bad ones; what earlier
changes did."""


class AgentSettings(BaseModel):
    """How the agents ask the LLM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reply: ReplyFormat = "lists"
    proposals_per_call: PositiveInt | None = None
    """None: all at once for `lists`, as in the paper; one for the others."""
    reasks: NonNegativeInt = 2
    """How often a bad reply is answered with what was wrong before the classical operator stands in."""
    tell: frozenset[Told] = frozenset({"sensitivity", "lessons"})
    temperature: float = Field(default=1.0, ge=0, le=2)
    max_tokens: PositiveInt = 4096
    """The most that one reply may take. Asking starts with what the reply needs and grows when one is cut off."""

    def split(self, count: int) -> list[int]:
        """How many proposals each call asks for."""
        size = self.proposals_per_call or (max(1, count) if self.reply == "lists" else 1)
        return [min(size, count - start) for start in range(0, count, size)]
