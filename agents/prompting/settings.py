"""Settings of the questions to the LLM: reply format, feedback, re-asks, sampling."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

ReplyFormat = Literal["lists", "edits", "moves"]
"""`lists`: whole configurations, as in the paper. `edits`: profiles, then small changes and mixes; takes a tenth of the
tokens. `moves`: profiles, then choices from ranked moves and mixes; takes a hundredth of the tokens."""

FeedbackPart = Literal["sensitivity", "weakest", "contrast", "effects"]
"""Facts that prompts may state. `sensitivity`: the units that hurt most and least when pruned alone. `weakest`: the
units of the best configuration that would gain most from less pruning, and those that would lose least from more.
`contrast`: how good configurations differ from bad ones. `effects`: the effects of earlier changes."""


class AgentSettings(BaseModel):
    """Settings of the questions to the LLM."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reply: ReplyFormat = "lists"
    proposals_per_call: PositiveInt | None = None
    """None: all in one call for `lists`, as in the paper; one for `edits` and `moves`."""
    reasks: NonNegativeInt = 2
    """How often the LLM is asked again, with what was wrong, before the fallback makes the rest."""
    feedback: tuple[FeedbackPart, ...] = ("sensitivity", "effects")
    temperature: float = Field(default=1.0, ge=0, le=2)
    max_tokens: PositiveInt = 4096
    """Token limit of one reply. A lower limit is tried first; it grows when a reply is cut off."""

    def split(self, count: int) -> list[int]:
        """Return the number of proposals that each call asks for, `count` in total."""
        size = self.proposals_per_call or (max(1, count) if self.reply == "lists" else 1)
        return [min(size, count - start) for start in range(0, count, size)]
