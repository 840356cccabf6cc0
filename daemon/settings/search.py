"""Settings of the search itself."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from daemon.settings.rules import seed_allocation
from daemon.settings.section import Section
from protocol.errors import UsageError
from protocol.plans.allocation import Allocation
from protocol.plans.plan import Split
from protocol.plans.shape import Granularity
from protocol.plans.spec import Importance, Measure, Reconstruction, Scoring
from protocol.queue.keys import check_search_name

ROLES = ("initializer", "selector", "mutator", "crossover")
ProposerName = Literal["llm", "best-of-n", "random", "evolution", "cma-es"]


def _checked_seed(seed: str) -> str:
    try:
        seed_allocation(seed)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return seed


class SearchSettings(Section):
    """The search: Algorithm 1's K, M, S and N, who proposes candidates, and how a rate becomes a pruned model."""

    name: Annotated[str, AfterValidator(check_search_name)] = "default"
    """Name of the search, of its keys in Redis and of its folder under run.folder. Give each search its own name."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of all random choices: the text windows, the text of `self`, the candidates that a prompt shows, the
    operators without an LLM, and the sampling of the LLM."""
    population: PositiveInt = 30
    """K: the size of the first population, and the number of parents kept each round."""
    mutations: int = Field(default=10, ge=0)
    """M: the number of offspring made by mutation each round; 0 leaves mutation out."""
    crossovers: int = Field(default=10, ge=0)
    """S: the number of offspring made by crossover each round; 0 leaves crossover out."""
    rounds: int = Field(default=20, ge=0)
    """N: the number of rounds after the first population."""
    mode: Literal["generational", "steady-state"] = "generational"
    """`generational` (the paper): each round waits for all its outcomes. `steady-state` (experimental): each outcome is
    followed by a new question at once. This keeps workers busy, but two runs with the same seed differ."""
    max_in_flight: PositiveInt | None = None
    """In `steady-state`, the maximum number of candidates that are asked for, queued or being measured at once. None
    means as many as keep all workers busy: two per worker, and more if an answer takes longer than an evaluation. With
    a number, each question asks for one candidate."""
    max_evaluations: PositiveInt | None = None
    """Maximum number of candidates, such as 200. The search ends at this number or after `rounds`, whichever comes
    first. None means no limit."""
    max_tokens: PositiveInt | None = None
    """Maximum number of measured tokens, summed over candidates. The search ends after the round in which this number
    is reached; none means no limit. It must be enough for the first population. With search.first_windows, use this
    limit instead of max_evaluations, because stopped candidates take fewer tokens."""
    budget_hours: PositiveFloat | None = None
    """Maximum running time in hours, including pauses and summed over restarts; none means no limit. Candidates that
    are already queued are still measured."""
    seeds: tuple[Annotated[str, AfterValidator(_checked_seed)], ...] = ()
    """Allocations included in the first population, any of `uniform`, `first-layer`, `owl`, `llm-pruner`,
    `sensitivity` and `rule`, such as `[rule, owl]`. `rule:FILE` takes the rule in a file, or the best rule in the
    rules.json of another search."""
    learn_from: tuple[Annotated[str, AfterValidator(check_search_name)], ...] = ()
    """Names of searches in run.folder that pruned the same model by other rates. The surrogate, which predicts the
    fitness of moves and plans, learns from their outcomes, and the first `plans` are near their best candidates.
    target.rates sets this. Methods that do not use the surrogate learn nothing."""
    proposer: ProposerName = "llm"
    """What proposes candidates: `llm` (the paper), or a method to compare the LLM with: `best-of-n` (the LLM without
    feedback), `random`, `evolution` (EvoPress) or `cma-es`. For those, search.initializer, selector, mutator and
    crossover do not count."""
    initializer: Literal["llm", "random", "plans", "rules"] = "llm"
    """What makes the first population if search.proposer is `llm`: the LLM, `random` profiles, `plans` near the
    allocation `rule`, or random `rules`."""
    selector: Literal["llm", "tournament", "none"] = "llm"
    """What chooses the parents: the LLM, a `tournament`, or `none`, which shows Mutator and Crossover the whole
    population, as in the paper's combined prompts."""
    mutator: Literal["llm", "classical", "ranked", "plans", "rules"] = "llm"
    """What mutates: the LLM, `classical` (a random change), `ranked` (a random choice among the moves that the
    surrogate ranks highest), `plans` (all rates at once, as the surrogate predicts them to be best), or `rules`
    (genetic programming over rules, such moves and such plans in turn)."""
    crossover: Literal["llm", "classical", "ranked", "rules"] = "llm"
    """What crosses over: the LLM, `classical` (a random mix of parents), `ranked` (a random choice among the mixes that
    the surrogate ranks highest), or `rules` (crossover of rules, such mixes and whole plans in turn)."""
    first_windows: PositiveInt | None = None
    """Experimental: measure each candidate on this number of windows first. If it is worse on them than the K-th best
    candidate of earlier rounds, do not measure the rest; `evolution` compares it with the best candidate. None measures
    every candidate on the whole text."""
    fitness: Measure = "perplexity"
    """What the search minimises on data.fitness: `perplexity` (the paper), or `kl`, the divergence from the dense
    model, which is less noisy on short texts."""
    granularity: Granularity = "layer"
    """What a rate applies to: `layer` (the paper), or `block`, with separate rates for attention and MLP."""
    split: Split = "equal"
    """At `layer` granularity, how attention and MLP share a layer's rate: `equal` (the paper), or `mlp-first`, which
    removes MLP channels before heads."""
    importance: Importance = "wanda-sp"
    """How heads and channels are scored: `wanda-sp`, `taylor` (LLM-Pruner), `magnitude`, or `obs` (experimental:
    optimal brain surgeon, for `reconstruction: least-squares`)."""
    scoring: Scoring = "dense"
    """`dense`: heads and channels are scored once, on the dense model. `sequential`: for every candidate, each layer is
    scored on the outputs of the pruned layers below it, which is slower and works only with `wanda-sp`."""
    reconstruction: Reconstruction = "none"
    """`none` (the paper), or `least-squares`: fit the remaining columns of the o and down projections so that each
    block computes nearly the same as before pruning. This lowers the perplexity at a small cost."""
    lowest_rate: float = Field(default=0.0, ge=0, lt=1)
    """Lowest pruning rate of any unit."""
    highest_rate: float = Field(default=0.95, gt=0, lt=1)
    """Highest pruning rate of any unit."""

    @model_validator(mode="after")
    def _fits_together(self) -> "SearchSettings":
        if self.max_evaluations is not None and self.max_evaluations < self.population:
            raise ValueError(
                f"search.max_evaluations ({self.max_evaluations}) is smaller than the first population "
                f"({self.population}): raise it, or lower search.population"
            )
        if len(self.seeds) > self.population:
            raise ValueError(
                f"search.seeds: {len(self.seeds)} seeds are more than the first population ({self.population}) holds"
            )
        if self.mode == "steady-state":
            if self.proposer == "cma-es":
                raise ValueError("the proposer `cma-es` learns from generations: search.mode cannot be `steady-state`")
            if self.mutations + self.crossovers == 0:
                raise ValueError("search.mode `steady-state` needs search.mutations or search.crossovers")
        return self

    @model_validator(mode="before")
    @classmethod
    def _without_roles(cls, given: Any) -> Any:
        """Leave out the agents of the proposer `llm` for other proposers, so that one setting compares methods."""
        if isinstance(given, dict) and given.get("proposer", "llm") != "llm":
            return {name: value for name, value in given.items() if name not in ROLES}
        return given

    @model_validator(mode="after")
    def _learns_from_others(self) -> "SearchSettings":
        if self.name in self.learn_from or len(set(self.learn_from)) < len(self.learn_from):
            raise ValueError("search.learn_from names other searches, each of them once")
        return self

    @property
    def seed_allocations(self) -> tuple[Allocation, ...]:
        """The allocations of `seeds`, in their order."""
        return tuple(seed_allocation(seed) for seed in self.seeds)

    def check_first_population(self, tokens: int) -> None:
        """Raise ValueError if max_tokens does not cover the first population, at `tokens` per candidate."""
        if self.max_tokens is not None and self.max_tokens < self.population * tokens:
            raise ValueError(
                f"search.max_tokens ({self.max_tokens:,}) is smaller than what the first population takes "
                f"({self.population} x {tokens:,}): raise it, or lower search.population"
            )

    def how_to_lengthen(self, proposed: int) -> str:
        """Return which setting ended a search after this many proposed candidates, and what to do about it."""
        name = "max_evaluations" if self.planned == self.max_evaluations else "rounds"
        if proposed < self.planned:
            name = next((each for each in ("max_tokens", "budget_hours") if getattr(self, each) is not None), name)
        return f"search.{name} is {getattr(self, name)}; a larger number lengthens the search"

    @property
    def planned(self) -> int:
        """Number of candidates to propose in all, if no other limit is reached first."""
        planned = self.population + self.rounds * (self.mutations + self.crossovers)
        return min(self.max_evaluations or planned, planned)

    def uses_surrogate(self, reply: str) -> bool:
        """Whether any agent uses the surrogate, and so learns from outcomes at other rates; `reply` is llm.reply."""
        if self.proposer != "llm":
            return False
        agents = {self.initializer, self.mutator, self.crossover}
        return bool(agents & {"plans", "ranked", "rules"}) or ("llm" in agents and reply in ("moves", "rules"))

    @property
    def asks_llm(self) -> bool:
        """Whether any agent asks an LLM."""
        agents: list[str] = [self.initializer, self.selector]
        agents += [self.mutator] if self.mutations else []
        agents += [self.crossover] if self.crossovers else []
        return self.proposer in ("llm", "best-of-n") and "llm" in agents
