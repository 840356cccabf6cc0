"""Build the agents that a search's settings ask for: LLM agents, or a baseline method."""

from agents.baselines.classical import OperatorAgent, RandomInitializer, TournamentSelector
from agents.baselines.cma_es import CmaEsMutator
from agents.baselines.evolution import sample_switches
from agents.crossover import Crossover
from agents.initializer import BestOfN, Initializer
from agents.llm.endpoint import ChatClient
from agents.mutator import Mutator
from agents.operators.rules import sample_rule
from agents.operators.sampling import (
    sample_mix,
    sample_mutation,
    sample_profile,
    sample_ranked_mix,
    sample_ranked_moves,
)
from agents.operators.strategy import sample_crossover_step, sample_mutation_step
from agents.operators.trust_region import sample_first_plan, sample_plan
from agents.selector import Selector
from daemon.search.roles import Agents, InitializerRole, OffspringRole, SelectorRole
from daemon.settings.llm import LlmSettings
from daemon.settings.search import SearchSettings


def make_agents(search: SearchSettings, llm: LlmSettings, chat: ChatClient) -> Agents:
    """Return the agents of a search. LLM agents send their questions to `chat`."""
    initializer = Initializer(chat, llm)
    if search.proposer == "best-of-n":
        return Agents(initializer, None, BestOfN(initializer), None)
    if search.proposer != "llm":
        return Agents(RandomInitializer(sample_profile), None, _offspring_agent(search), None)
    initializers: dict[str, InitializerRole] = {
        "llm": initializer,
        "random": RandomInitializer(sample_profile),
        "plans": RandomInitializer(sample_first_plan),
        "rules": RandomInitializer(sample_rule),
    }
    selectors: dict[str, SelectorRole | None] = {
        "llm": Selector(chat, llm, chooses_step=_has_steps(search, llm)),
        "tournament": TournamentSelector(),
        "none": None,
    }
    mutators: dict[str, OffspringRole] = {
        "llm": Mutator(chat, llm),
        "classical": OperatorAgent("mutator", sample_mutation, min_parents=1),
        "ranked": OperatorAgent("mutator", sample_ranked_moves, min_parents=1),
        "rules": OperatorAgent("mutator", sample_mutation_step, min_parents=1),
        "plans": OperatorAgent("mutator", sample_plan, min_parents=1),
    }
    crossovers: dict[str, OffspringRole] = {
        "llm": Crossover(chat, llm),
        "classical": OperatorAgent("crossover", sample_mix, min_parents=2),
        "ranked": OperatorAgent("crossover", sample_ranked_mix, min_parents=2),
        "rules": OperatorAgent("crossover", sample_crossover_step, min_parents=2),
    }
    return Agents(
        initializer=initializers[search.initializer],
        selector=selectors[search.selector],
        mutator=mutators[search.mutator],
        crossover=crossovers[search.crossover],
    )


def _has_steps(search: SearchSettings, llm: LlmSettings) -> bool:
    """Whether any agent makes rules, moves or plans in turn."""
    agents = {search.mutator, search.crossover}
    return "rules" in agents or (llm.reply == "rules" and "llm" in agents)


def _offspring_agent(search: SearchSettings) -> OffspringRole:
    if search.proposer == "random":
        return OperatorAgent("mutator", sample_profile, min_parents=0)
    if search.proposer == "evolution":
        return OperatorAgent("mutator", sample_switches, min_parents=1)
    return CmaEsMutator(search.mutations + search.crossovers)
