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

from protocol.plan import Parameters, Plan

AgentName = Literal["seed", "initializer", "mutator", "crossover", "baseline"]
"""Who proposed. A seed is an allocation without search that takes part in the first population; a baseline is measured
to compare with, and takes no part."""
Source = Literal["llm", "stand-in", "classical", "allocation"]
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


LEAST_RACE = 3
"""Before so many windows nobody is stopped."""


class Race(_Value):
    """What a candidate has to keep up with: it is stopped where it is worse.

    `against` are another candidate's losses, window by window; without them nothing is stopped, but losses are kept.
    """

    against: tuple[float, ...]
    confidence: float | None = Field(default=None, gt=0, lt=1)
    """It is stopped after any window where it is worse with so much confidence."""
    first_windows: PositiveInt | None = None
    """It is stopped after so many windows where it is worse on them, by however little: the low fidelity of two."""


class Candidate(_Value):
    """Pruning rates, the plan they become, and where they come from."""

    id: str
    rates: tuple[float, ...]
    plan: Plan
    provenance: Provenance
    text: Text = "fitness"
    race: Race | None = None
    on_windows: tuple[NonNegativeInt, ...] | None = None
    """Of a trial, the windows of its text that it is measured on, by their place: it is compared with its siblings on
    them. Who is chosen is proposed as a candidate of its own. None: the whole text."""

    @property
    def is_proposal(self) -> bool:
        """Whether it takes part in the search: no baseline, and no trial."""
        return self.on_windows is None and self.provenance.agent != "baseline"


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


class _WithFitness(_Figures):
    """Figures that can be compared with others of the same windows."""

    @property
    def fitness(self) -> float:
        """What the search minimises."""
        return self.perplexity if self.kl is None else self.kl

    def figures(self, digits: int) -> dict[str, float]:
        """`perplexity`, and `kl` where it was measured, rounded for people."""
        figures = {"perplexity": self.perplexity, "kl": self.kl}
        return {name: round(figure, digits) for name, figure in figures.items() if figure is not None}


class Measured(_WithFitness):
    """A candidate's measurement on the whole text."""

    kind: Literal["measured"] = "measured"
    losses: tuple[float, ...] = ()
    """Of each window, where the candidate raced: mean negative log-likelihood, or divergence, in nats a token."""


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


class Sampled(_WithFitness):
    """A trial's measurement on its windows alone. `perplexity` and `kl` compare with those of the same windows only."""

    kind: Literal["sampled"] = "sampled"


class Failed(_Value):
    """A candidate that could not be measured. It never enters the population and is not tried again."""

    kind: Literal["failed"] = "failed"
    reason: FailureReason
    detail: str = ""


Outcome = Measured | Stopped | Sampled | Failed
OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Annotated[Outcome, Field(discriminator="kind")])


@dataclass(frozen=True)
class Result:
    """An outcome as read from the result stream at `cursor`."""

    cursor: str
    id: str
    outcome: Outcome


def candidate_id(plan: Plan, fingerprint: str, text: Text = "fitness", on_windows: Sequence[int] | None = None) -> str:
    """Sixteen hex digits that name a plan and what it is measured on; equal plans are the same candidate."""
    part = "" if on_windows is None else f"|{','.join(map(str, on_windows))}"
    content = f"{fingerprint}|{text}{part}|{plan.model_dump_json()}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]
