"""Settings of the questions to the LLM: reply format, feedback, re-asks, sampling."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

ReplyFormat = Literal["lists", "edits", "moves"]
FeedbackPart = Literal["sensitivity", "weakest", "contrast", "effects"]
"""Facts that prompts may state. `sensitivity`: the units that hurt most and least when pruned alone. `weakest`: the
units of the best configuration that would gain most from less pruning, and those that would lose least from more.
`contrast`: how good configurations differ from bad ones. `effects`: what earlier changes did to the fitness."""


class AgentSettings(BaseModel):
    """How agents ask the LLM; the fields are settings `llm.*`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    reply: ReplyFormat = "lists"
    """What the LLM replies with: `lists` of all rates (the paper; needs a large model), `edits` (small changes), or
    `moves` (choices from a ranked menu of moves; fewest tokens)."""
    feedback: tuple[FeedbackPart, ...] = ("sensitivity", "effects")
    """What prompts contain besides the configurations: any of `sensitivity`, `weakest`, `contrast` and `effects`. `[]`
    is the paper's."""
    proposals_per_call: PositiveInt | None = None
    """Candidates requested per call; none means all of a round at once for `lists`, and one for the other reply
    formats."""
    reasks: int = Field(default=2, ge=0, le=10)
    """Times that an invalid reply is returned to the LLM with an explanation before the classical operator proposes in
    its place."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature."""
    max_tokens: PositiveInt = 4096
    """Maximum tokens of one reply. A lower limit is tried first and raised when a reply is cut off."""

    def split(self, count: int) -> list[int]:
        """Return the number of proposals that each call asks for, `count` in total."""
        size = self.proposals_per_call or (max(1, count) if self.reply == "lists" else 1)
        return [min(size, count - start) for start in range(0, count, size)]
