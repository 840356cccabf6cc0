"""Rehearses a search without an LLM and without a model, to know how many questions it asks and how long they are.

The agents are the real ones. Their candidates get made-up figures, and no question is answered, so that operators
without an LLM propose. The prompts are as long as those of a real search with the same settings.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from agents.llm.endpoint import Answer, ChatClient, Question
from agents.population.view import KNOWN_ALREADY, Accepted, Refused, View
from daemon.search.admission import planned
from daemon.search.make_agents import make_agents
from daemon.search.roles import Agents
from daemon.search.snapshot import view_of_round
from daemon.search.state import SearchState
from daemon.settings.settings import Settings
from protocol.errors import BudgetError, EndpointError
from protocol.plans.candidate import Candidate, Measured, Provenance, candidate_id
from protocol.plans.plan import count_parameters
from protocol.plans.profile import DensePerplexity, ModelProfile
from protocol.plans.shape import ModelShape

REHEARSED_ROUNDS = 4
"""Rounds that are played; the others are assumed to be like their mean."""
CHARACTERS_PER_TOKEN = 3.5
"""Characters per token of prompts with many numbers; English text alone has 4 to 5."""
UNANSWERED = "this is a rehearsal"
SENSITIVITY = 0.02
"""Nats per token that pruning one unit costs, as in small models."""


@dataclass(frozen=True)
class Questions:
    """Number and size of a search's questions, in the first population and in each later round."""

    first: int
    first_characters: int
    first_reply_tokens: int
    each_round: float
    round_characters: float
    round_reply_tokens: float

    def total(self, rounds: float) -> "Total":
        """Return the sums over the first population and this number of rounds."""
        return Total(
            questions=self.first + rounds * self.each_round,
            prompt_tokens=(self.first_characters + rounds * self.round_characters) / CHARACTERS_PER_TOKEN,
            reply_tokens=self.first_reply_tokens + rounds * self.round_reply_tokens,
        )


@dataclass(frozen=True)
class Total:
    """All questions of a search."""

    questions: float
    prompt_tokens: float
    reply_tokens: float


class _Listener:
    """Stands for the LLM: notes each question and answers none."""

    def __init__(self) -> None:
        self.asked: list[Question] = []

    async def ask(self, question: Question) -> Answer:
        self.asked.append(question)
        raise EndpointError(UNANSWERED, retryable=False)

    def take(self) -> tuple[int, int, int]:
        """Return number, characters and tokens of replies of the questions since the last call."""
        asked, self.asked = self.asked, []
        characters = sum(len(message["content"]) for question in asked for message in question.messages)
        return len(asked), characters, sum(question.max_tokens for question in asked)


async def rehearse(settings: Settings, shape: ModelShape) -> Questions:
    """Return the questions that the search of `settings` asks about a model of this `shape`."""
    search, listener = settings.search, _Listener()
    agents = make_agents(search, settings.llm, listener)
    stage = _Stage(settings, shape)
    if (missing := search.population - len(search.seeds)) > 0:
        await agents.initializer.propose(stage.view(0), missing, stage.submit)
    first = listener.take()
    await stage.fill(2)  # a round needs two members; allocations are not rehearsed
    rounds = min(search.rounds, REHEARSED_ROUNDS)
    for number in range(1, rounds + 1):
        await _play(agents, stage, number)
    played = max(1, rounds)
    return Questions(*first, *(total / played for total in listener.take()))


async def ask_once(settings: Settings, shape: ModelShape, chat: ChatClient) -> int:
    """Ask `chat` for one candidate as the search would; return 1 if a usable one came, else 0."""
    search, llm = settings.search, settings.llm.model_copy(update={"share": 1.0, "what_if": 0})
    stage = _Stage(settings, shape)
    unasked = make_agents(search, llm, _Listener())
    await unasked.initializer.propose(stage.view(0), max(2, search.population), stage.submit)
    await stage.fill(2)
    agents, view = make_agents(search, llm, chat), stage.view(1)
    if search.initializer == "llm" or search.proposer != "llm":
        await agents.initializer.propose(replace(view, round=0), 1, stage.submit)
    elif search.mutator == "llm" and search.mutations:
        await agents.mutator.propose(view, view.population, 1, stage.submit)
    elif search.crossover == "llm" and search.crossovers and agents.crossover:
        await agents.crossover.propose(view, view.population, 1, stage.submit)
    elif agents.selector is not None:
        return int((await agents.selector.select(view, 2)).source == "llm")
    return stage.made_by_llm


async def _play(agents: Agents, stage: "_Stage", number: int) -> None:
    """Play one round: select, mutate, cross over."""
    search, view = stage.settings.search, stage.view(number)
    parents = view.population
    if agents.selector is not None:
        selection = await agents.selector.select(view, search.mutations + search.crossovers)
        parents, view = selection.parents, replace(view, step=selection.step)
    mutations = search.mutations if agents.crossover else search.mutations + search.crossovers
    if search.mode == "steady-state":  # each question asks for one candidate, and is a round of its own
        for turn in range(search.mutations + search.crossovers):
            agent = agents.crossover if agents.crossover and turn >= mutations else agents.mutator
            own = replace(view, round=number * (search.mutations + search.crossovers) + turn)
            await agent.propose(own, parents, 1, stage.submit)
        return
    await agents.mutator.propose(view, parents, mutations, stage.submit)
    if agents.crossover:
        await agents.crossover.propose(view, parents, search.crossovers, stage.submit)


class _Stage:
    """A search whose candidates are measured at once, with made-up figures."""

    def __init__(self, settings: Settings, shape: ModelShape) -> None:
        self.settings = settings
        spec = settings.spec()
        units = shape.units(spec.granularity)
        dense = DensePerplexity(perplexity=8.0, tokens=1, windows=1, seconds=1.0)
        profile = ModelProfile(
            fingerprint=spec.fingerprint,
            model=spec.model,
            shape=shape,
            dense=dense,
            dense_report=dense if spec.report else None,
            sensitivity=tuple(SENSITIVITY * (1 + _noise(unit.name)) for unit in units),
            outliers=tuple(5 * _noise(f"outliers {i}") for i in range(len(shape.layers))),
            texts="",
            device="",
        )
        self._state = SearchState(spec, profile, lessons="")

    def view(self, number: int) -> View:
        """Return what agents see in a round."""
        return view_of_round(self._state, self.settings.search.population, number)

    async def fill(self, least: int) -> None:
        """Measure made-up candidates until the population has this many members, if the model has so many plans."""
        units = len(self._sensitivity)
        for i in range(10 * least):
            if len(self._state.population) >= least:
                return
            rates = [self._state.spec.rate * (1 + (0.1 + 0.05 * i) * (-1) ** unit) for unit in range(units)]
            await self.submit(rates, Provenance(agent="initializer", source="allocation", round=0))

    @property
    def made_by_llm(self) -> int:
        """Return the number of candidates that an LLM made."""
        return self._state.proposals.by_source["llm"]

    async def submit(self, rates: Sequence[float], provenance: Provenance) -> Accepted | Refused:
        """Accept a new plan and measure it."""
        state = self._state
        spec, shape = state.spec, state.profile.shape
        try:
            feasible, plan = planned(spec, shape, rates)
        except BudgetError as error:
            return Refused(str(error))
        id_ = candidate_id(plan, spec.fingerprint)
        if id_ in state.ledger:
            return KNOWN_ALREADY
        candidate = Candidate(id=id_, rates=feasible, plan=plan, provenance=provenance)
        state.ledger[id_] = candidate
        state.proposals.add(candidate)
        rise = sum(s * (r / spec.rate) ** 2 for s, r in zip(self._sensitivity, feasible, strict=True))
        kl = rise * (1 + 0.1 * _noise(id_))
        outcome = Measured(
            perplexity=8.0 * math.exp(kl),
            kl=kl if spec.measure == "kl" else None,
            parameters=count_parameters(plan, shape),
            tokens=1,
            seconds=1.0,
        )
        state.population.insert(candidate, outcome)
        return Accepted(id_)

    @property
    def _sensitivity(self) -> tuple[float, ...]:
        return self._state.profile.sensitivity


def _noise(of: str) -> float:
    """Return a number from 0 to 1 that looks random, and is the same in each rehearsal."""
    return int.from_bytes(hashlib.sha256(of.encode()).digest()[:4], "big") / 2**32
