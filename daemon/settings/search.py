"""Settings of the search itself."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from daemon.settings.section import Section
from protocol.plans.allocation import Method
from protocol.plans.plan import Split
from protocol.plans.shape import Granularity
from protocol.plans.spec import Importance, Measure, Reconstruction, Scoring
from protocol.queue.keys import check_search_name

ProposerName = Literal["llm", "best-of-n", "random", "evolution", "cma-es"]


class SearchSettings(Section):
    """How the search goes: Algorithm 1's K, M, S and N, and what its rates apply to."""

    name: Annotated[str, AfterValidator(check_search_name)] = "default"
    """Names the search in Redis and its folder under run.folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds windows, prompts' sampling and the classical operators."""
    population: PositiveInt = 30
    """K: candidates of the first population, and parents kept each round."""
    mutations: int = Field(default=10, ge=0)
    """M: offspring by mutation each round."""
    crossovers: int = Field(default=10, ge=0)
    """S: offspring by crossover each round."""
    rounds: int = Field(default=20, ge=0)
    """N: rounds after the first population."""
    mode: Literal["generational", "steady-state"] = "generational"
    """`generational` (the paper): rounds wait for their outcomes. `steady-state`: each outcome brings a question."""
    max_in_flight: PositiveInt = 4
    """steady-state: candidates asked for, queued and measured at a time; about two for each worker."""
    max_evaluations: PositiveInt | None = None
    """Stop proposing after so many candidates, whatever the rounds; none means no limit."""
    max_tokens: PositiveInt | None = None
    """Stop, after a round, when candidates were measured on so many tokens: search.first_windows saves some; none means
    no limit. The first population must fit, and search.rounds must be enough for the rest."""
    budget_hours: PositiveFloat | None = None
    """Stop proposing when the daemon has run so long, restarts and pauses included; none means no limit."""
    seeds: tuple[Method, ...] = ()
    """Allocations that take part in the first population: of `uniform`, `first-layer`, `owl`, `llm-pruner`,
    `sensitivity`."""
    proposer: ProposerName = "llm"
    """`llm` (the paper), `best-of-n` (the LLM without feedback), `random`, `evolution` (EvoPress) or `cma-es`."""
    initializer: Literal["llm", "random"] = "llm"
    """With the proposer `llm`: who makes the first population."""
    selector: Literal["llm", "tournament", "none"] = "llm"
    """Who chooses parents; `none`: Mutator and Crossover choose themselves, from the whole population (the paper)."""
    mutator: Literal["llm", "classical", "ranked"] = "llm"
    """Who mutates; `ranked` draws from a surrogate's trades. search.mutations: 0 leaves mutation out."""
    crossover: Literal["llm", "classical", "ranked"] = "llm"
    """Who crosses; `ranked` draws from a surrogate's mixes. search.crossovers: 0 leaves crossover out."""
    first_windows: PositiveInt | None = None
    """Multi-fidelity: a candidate that is worse than the K-th best (with `evolution`: the best) on so many windows is
    measured no further; none: all are measured whole."""
    fitness: Measure = "perplexity"
    """What the search minimises on data.fitness: `perplexity` (the paper), or `kl`, divergence from the dense model."""
    granularity: Granularity = "layer"
    """What a rate applies to: `layer` (the paper) or `block` (attention and MLP apart)."""
    split: Split = "equal"
    """At layer granularity, how heads and MLP share a rate: `equal` (the paper) or `mlp-first`."""
    importance: Importance = "wanda-sp"
    """How heads and channels are scored: `wanda-sp`, `taylor` (LLM-Pruner), `magnitude` or `obs` (what the rest can
    make up for goes first)."""
    scoring: Scoring = "dense"
    """`dense`: once. `sequential`: for each candidate anew, each layer on the pruned ones below (only wanda-sp)."""
    reconstruction: Reconstruction = "none"
    """`none` (the paper), or `least-squares`: what stays of o and down is fitted to make up for what is removed."""
    lowest_rate: float = Field(default=0.0, ge=0, lt=1)
    """No unit is pruned less than this share."""
    highest_rate: float = Field(default=0.95, gt=0, lt=1)
    """No unit is pruned more than this share."""

    @model_validator(mode="after")
    def _fits_together(self) -> "SearchSettings":
        if self.max_evaluations is not None and self.max_evaluations < self.population:
            raise ValueError(
                f"search.max_evaluations ({self.max_evaluations}) is smaller than the first population "
                f"({self.population}): give more, or a smaller search.population"
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
        for agent in ("initializer", "selector", "mutator", "crossover"):
            if self.proposer != "llm" and getattr(self, agent) != "llm":
                raise ValueError(f"search.{agent} is for the proposer `llm`, not for {self.proposer!r}")
        return self

    def check_first_population(self, tokens: int) -> None:
        """Raise ValueError where the first population alone takes more than max_tokens; `tokens` are of each."""
        if self.max_tokens is not None and self.max_tokens < self.population * tokens:
            raise ValueError(
                f"search.max_tokens ({self.max_tokens:,}) is smaller than what the first population takes "
                f"({self.population} x {tokens:,}): give more, or a smaller search.population"
            )

    @property
    def asks_llm(self) -> bool:
        """Whether any agent asks an LLM."""
        agents: list[str] = [self.initializer, self.selector]
        agents += [self.mutator] if self.mutations else []
        agents += [self.crossover] if self.crossovers else []
        return self.proposer in ("llm", "best-of-n") and "llm" in agents
