"""Candidates and their outcomes, to and from JSON."""

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
)

from protocol.plans.plan import Parameters, Plan
from protocol.plans.value import FiniteValue

AgentName = Literal["seed", "initializer", "mutator", "crossover", "baseline"]
"""The agent that proposed a candidate. A `seed` is an allocation in the first population. A `baseline` is measured for
comparison only and never enters the population."""
Source = Literal["llm", "fallback", "classical", "allocation"]
"""The source of the rates: the LLM, the fallback if no endpoint gives a usable answer, an operator or optimiser
without an LLM that the settings choose (`classical`), or an allocation."""
SOURCE_NAMES: dict[str, str] = {
    "llm": "LLM", "fallback": "fallback", "classical": "optimiser", "allocation": "allocation",
}  # fmt: skip
"""The sources in the words of tables and charts."""
Step = Literal["rules", "moves", "plans"]
"""What made a candidate: a formula for all rates, moves of rate between a few units, or a whole plan by the surrogate.
"""
Text = Literal["fitness", "report"]
"""The text that a candidate is measured on: `fitness` guides the search, `report` is for the final figures."""
FailureReason = Literal["timeout", "crashed", "out-of-memory", "not-finite", "invalid"]


class Provenance(FiniteValue):
    """Where a candidate comes from. Round 0 is the first population.

    `call` numbers the questions of one agent in one round. `endpoint` and `prompt` are set only if an LLM proposed it.
    """

    agent: AgentName
    source: Source
    round: NonNegativeInt
    call: NonNegativeInt = 0
    parents: tuple[str, ...] = ()
    endpoint: str | None = None
    prompt: str | None = None
    rule: str | None = None
    """The rule that gave the rates (protocol/plans/rule.py), if one did."""
    step: Step | None = None
    """What made the candidate, if it is one of these."""

    @property
    def log_fields(self) -> dict[str, Any]:
        """Who proposed the candidate, as fields of the log and of events: `agent`, `source` and `round`."""
        return self.model_dump(include={"agent", "source", "round"})


class KeptSelection(FiniteValue):
    """What the Selector chose for a round: the ids of the parents, and what makes the offspring, if it chose that."""

    parents: tuple[str, ...]
    step: Step | None = None


class Race(FiniteValue):
    """A race against another candidate. This candidate is stopped after `first_windows` windows if it is worse on them.

    `against` holds the other candidate's losses per window. If `against` is empty, this candidate is not stopped, and
    its losses are recorded.
    """

    against: tuple[float, ...]
    first_windows: PositiveInt

    def is_decided_after(self, windows: int) -> bool:
        """Whether the race is decided when this many windows are measured.

        A candidate that has no windows left is fully measured, even if it is worse.
        """
        return windows == self.first_windows < len(self.against)

    def is_lost(self, losses: Sequence[float]) -> bool:
        """Whether a candidate with these `losses`, one per window so far, is to be stopped now."""
        seen = len(losses)
        return self.is_decided_after(seen) and math.fsum(losses) > math.fsum(self.against[:seen])


class Candidate(FiniteValue):
    """Pruning rates, their plan, and their provenance."""

    id: str
    rates: tuple[float, ...]
    plan: Plan
    provenance: Provenance
    text: Text = "fitness"
    race: Race | None = None

    @property
    def is_proposal(self) -> bool:
        """Whether the candidate takes part in the search, which baselines do not."""
        return self.provenance.agent != "baseline"


class _Figures(FiniteValue):
    """Measurements of a pruned model, on a whole text or a part of it.

    `tokens` is the number of tokens whose loss was averaged, `seconds` the evaluation's wall time, and `kl` the mean KL
    divergence from the dense model in nats per token, set if the spec's measure is `kl`.
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
    """Negative log-likelihood or divergence of each window in nats, divided by the mean number of predicted tokens per
    window; empty without a race. Their mean is the mean over all tokens."""

    @property
    def fitness(self) -> float:
        """The number that the search minimises: divergence if measured, else perplexity."""
        return self.perplexity if self.kl is None else self.kl


class Stopped(_Figures):
    """A candidate that lost its race and was stopped after some windows.

    It never enters the population. `perplexity` and `kl` cover only the measured windows: do not compare them with
    figures of the whole text.
    """

    kind: Literal["stopped"] = "stopped"
    behind: float
    """How much worse this candidate was than the other candidate on the same windows, in nats per token."""
    windows: NonNegativeInt
    of_windows: NonNegativeInt

    def guess(self, race: Race) -> float:
        """Estimate the fitness, assuming that the candidate is as far behind on all windows of the race."""
        level = statistics.fmean(race.against) + self.behind
        return math.exp(level) if self.kl is None else level


class Failed(FiniteValue):
    """A candidate that could not be measured. It never enters the population and is not retried."""

    kind: Literal["failed"] = "failed"
    reason: FailureReason
    detail: str = ""


Outcome = Measured | Stopped | Failed
OUTCOME: TypeAdapter[Outcome] = TypeAdapter(Annotated[Outcome, Field(discriminator="kind")])

SHOWN = {
    "measured": {"perplexity", "kl"},
    "stopped": {"windows", "of_windows", "behind"},  # its perplexity covers only a part of the text
    "failed": {"reason", "detail"},
}
"""Fields of each kind of outcome in the log and in events."""


def outcome_fields(candidate: Candidate, outcome: Outcome) -> dict[str, Any]:
    """Return the fields that describe an outcome, in the log of the daemon and the workers and in events.

    Figures are rounded to six decimals.
    """
    shown = outcome.model_dump(include=SHOWN[outcome.kind], exclude_none=True)
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in shown.items()}
    return {"candidate": candidate.id, "text": candidate.text, **rounded, **candidate.provenance.log_fields}


@dataclass(frozen=True)
class Result:
    """An outcome read from the result stream at `cursor`."""

    cursor: str
    id: str
    outcome: Outcome


def candidate_id(plan: Plan, fingerprint: str, text: Text = "fitness") -> str:
    """Return sixteen hex digits that identify a plan and its measurement; equal plans are the same candidate."""
    content = f"{fingerprint}|{text}|{plan.model_dump_json()}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]
