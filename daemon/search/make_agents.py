"""Build the agents that a search's settings ask for: the LLM's, or a method to compare them with."""

from agents.baselines.classical import (
    ClassicalCrossover,
    ClassicalMutator,
    RandomInitializer,
    RandomMutator,
    RankedCrossover,
    RankedMutator,
    TournamentSelector,
)
from agents.baselines.evolution import EvolutionMutator
from agents.crossover import Crossover
from agents.initializer import BestOfN, Initializer
from agents.llm.endpoint import ChatClient
from agents.mutator import Mutator
from agents.prompting.prompts import PromptTemplates
from agents.selector import Selector
from daemon.search.roles import Agents, OffspringRole, SelectorRole
from daemon.settings.llm import LlmSettings
from daemon.settings.packages import need
from daemon.settings.search import SearchSettings


def make_agents(search: SearchSettings, llm: LlmSettings, chat: ChatClient) -> Agents:
    """Return the agents of a search; those that ask an LLM ask `chat`.

    Raises SettingsError if a package is missing.
    """
    prompts = PromptTemplates()
    initializer = Initializer(chat, prompts, llm)
    if search.proposer == "best-of-n":
        return Agents(initializer, None, BestOfN(initializer), None)
    if search.proposer != "llm":
        return Agents(RandomInitializer(), None, _offspring_agent(search), None)
    selectors: dict[str, SelectorRole | None] = {
        "llm": Selector(chat, prompts, llm),
        "tournament": TournamentSelector(),
        "none": None,
    }
    mutators: dict[str, OffspringRole] = {
        "llm": Mutator(chat, prompts, llm),
        "classical": ClassicalMutator(),
        "ranked": RankedMutator(),
    }
    crossovers: dict[str, OffspringRole] = {
        "llm": Crossover(chat, prompts, llm),
        "classical": ClassicalCrossover(),
        "ranked": RankedCrossover(),
    }
    return Agents(
        initializer=initializer if search.initializer == "llm" else RandomInitializer(),
        selector=selectors[search.selector],
        mutator=mutators[search.mutator],
        crossover=crossovers[search.crossover],
    )


def check_proposer(search: SearchSettings) -> None:
    """Raise SettingsError if the proposer's package is missing."""
    if search.proposer == "cma-es":
        need("cmaes", "baselines")


def _offspring_agent(search: SearchSettings) -> OffspringRole:
    if search.proposer == "random":
        return RandomMutator()
    if search.proposer == "evolution":
        return EvolutionMutator()
    check_proposer(search)
    from agents.baselines.cma_es import CmaEsMutator

    return CmaEsMutator(search.mutations + search.crossovers)
