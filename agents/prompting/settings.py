"""Settings of the questions to the LLM: reply format, feedback, re-asks, sampling."""

import random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

ReplyFormat = Literal["lists", "edits", "moves", "rules"]
FeedbackPart = Literal["sensitivity", "weakest", "contrast", "effects"]
"""Facts that prompts may state. `sensitivity`: the units that hurt most and least when pruned alone. `weakest`: the
units of the best configuration that would gain most from less pruning, and those that would lose least from more.
`contrast`: how good configurations differ from bad ones. `effects`: what earlier changes did to the fitness."""


class AgentSettings(BaseModel):
    """How agents ask the LLM; the fields are settings `llm.*`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    reply: ReplyFormat = "lists"
    """Form of the LLM's replies: `lists` of all rates (the paper; needs a large model), `edits` (small changes),
    `moves` (choices from a ranked menu of moves; fewest tokens), or `rules` (experimental: formulas that compute the
    rates from features of the units, then moves)."""
    feedback: tuple[FeedbackPart, ...] = ("sensitivity", "effects")
    """Facts that prompts state besides the configurations: `sensitivity` (the units that hurt most or least when pruned
    alone), `weakest` (the units of the best configuration that
    should be pruned less or more first, as the surrogate predicts), `contrast` (how good
    configurations differ from bad ones) and `effects` (what earlier changes did to the fitness). `[]` gives the paper's
    prompts."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the offspring that the LLM is asked for. The others are whole plans with `moves`; rules, moves or plans
    with `rules`; and otherwise made by operators without an LLM. With 0.3 and `moves`, an optimiser searches, and the
    LLM adds ideas."""
    what_if: int = Field(default=0, ge=0, le=10)
    """Number of drafts that the LLM may make of a rule or a choice of moves before it answers; it is told what the
    surrogate predicts of each. Each answer then takes two requests. 0 asks for the answer at once."""
    proposals_per_call: PositiveInt | None = None
    """Number of candidates requested per call. None means all candidates of a round for `lists`, and one candidate for
    the other reply formats, or several in a steady state whose workers would otherwise wait for answers."""
    reasks: int = Field(default=2, ge=0, le=10)
    """Number of times that an invalid reply is returned to the LLM with an explanation. After that, an
    operator without an LLM proposes instead."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Sampling temperature."""
    max_tokens: PositiveInt = 4096
    """Maximum number of tokens of one reply. A question is first asked with a lower limit, which is raised up to this
    one if the reply is cut off."""

    def asks(self, rng: random.Random) -> bool:
        """Whether the LLM is asked for a candidate, by `share`."""
        return self.share == 1 or rng.random() < self.share

    def split(self, count: int, together: int = 1) -> list[int]:
        """Return the number of proposals that each call asks for, `count` in total."""
        size = self.proposals_per_call or (max(1, count) if self.reply == "lists" else together)
        return [min(size, count - start) for start in range(0, count, size)]
