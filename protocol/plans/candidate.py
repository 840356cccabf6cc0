"""Candidates and their outcomes, to and from JSON."""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
)

from protocol.plans.plan import Parameters, Plan

AgentName = Literal["seed", "initializer", "mutator", "crossover", "baseline"]
"""Who proposed. A seed is an allocation without search that takes part in the first population; a baseline is measured
to compare with, and takes no part."""
Source = Literal["llm", "fallback", "classical", "allocation"]
"""Who made the rates: the LLM, the classical operator that stands in for it, one that was chosen in its place, or an
allocation without search."""
Text = Literal["fitness", "report"]
"""Which text a candidate is measured on: the one searched on, or the one reported on."""
FailureReason = Literal["timeout", "crashed", "out-of-memory", "not-finite", "invalid"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Provenance(_Value):
    """Where a candidate comes from. Round 0 is the first population; `endpoint` and `prompt` only if an LLM made it.

    `call` tells the questions that one agent asks in one round apart.
    """

    agent: AgentName
    source: Source
    round: NonNegativeInt
    call: NonNegativeInt = 0
    parents: tuple[str, ...] = ()
    endpoint: str | None = None
    prompt: str | None = None


class Race(_Value):
    """What a candidate has to keep up with: it is stopped after `first_windows` of its windows if it is worse on them.

    `against` are another candidate's losses, window by window; without them nothing is stopped, but losses are kept.
    """

    against: tuple[float, ...]
    first_windows: PositiveInt

    def is_lost(self, losses: Sequence[float]) -> bool:
        """Whether the candidate with these `losses` of its windows so far is stopped now."""
        seen = len(losses)
        # A candidate that has no window left is whole, whatever its losses.
        is_time = seen == self.first_windows < len(self.against)
        return is_time and math.fsum(losses) > math.fsum(self.against[:seen])


class Candidate(_Value):
    """Pruning rates, the plan they become, and where they come from."""

    id: str
    rates: tuple[float, ...]
    plan: Plan
    provenance: Provenance
    text: Text = "fitness"
    race: Race | None = None

    @property
    def is_proposal(self) -> bool:
        """Whether it takes part in the search: it is no baseline."""
        return self.provenance.agent != "baseline"


class _Figures(_Value):
    """What is measured of a pruned model, on a whole text or a part of it.

    `tokens` are those whose loss was averaged; `seconds` the evaluation's wall time. `kl`, the mean divergence from the
    dense model in nats, is there where the spec's measure is `kl`.
    """

    perplexity: PositiveFloat
    kl: NonNegativeFloat | None = None
    parameters: Parameters
    tokens: NonNegativeInt
    seconds: NonNegativeFloat


class Measured(_Figures):
    """A candidate's measurement on the whole text."""

    kind: Literal["measured"] = "measured"
    losses: tuple[float, ...] = ()
    """Of each window, where the candidate raced: mean negative log-likelihood, or divergence, in nats a token."""

    @property
    def fitness(self) -> float:
        """What the search minimises."""
        return self.perplexity if self.kl is None else self.kl

    def figures(self, digits: int) -> dict[str, float]:
        """`perplexity`, and `kl` where it was measured, rounded for people."""
        figures = {"perplexity": self.perplexity, "kl": self.kl}
        return {name: round(figure, digits) for name, figure in figures.items() if figure is not None}


class Stopped(_Figures):
    """A candidate that was stopped after some windows, for it was worse than what it raced against.

    It never enters the population. `perplexity` and `kl` are those of the windows that were measured, and must not be
    compared with whole ones.
    """

    kind: Literal["stopped"] = "stopped"
    behind: float
    """By how much it was worse than what it raced against, in nats a token, on the same windows."""
    windows: NonNegativeInt
    of_windows: NonNegativeInt

    def guess(self, race: Race) -> float:
        """The fitness that it would have if it stayed as far behind on all windows of its race."""
        level = statistics.fmean(race.against) + self.behind
        return math.exp(level) if self.kl is None else level


class Failed(_Value):
    """A candidate that could not be measured. It never enters the population and is not tried again."""

    kind: Literal["failed"] = "failed"
    reason: FailureReason
    detail: str = ""


Outcome = Measured | Stopped | Failed
OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Annotated[Outcome, Field(discriminator="kind")])


@dataclass(frozen=True)
class Result:
    """An outcome as read from the result stream at `cursor`."""

    cursor: str
    id: str
    outcome: Outcome


def candidate_id(plan: Plan, fingerprint: str, text: Text = "fitness") -> str:
    """Sixteen hex digits that name a plan and what it is measured on; equal plans are the same candidate."""
    content = f"{fingerprint}|{text}|{plan.model_dump_json()}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]
