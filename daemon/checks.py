"""What of a search's settings can only be checked once the model is known; and what is allowed, but should be known."""

from collections.abc import Sequence

import structlog

from agents.lists import TOKENS_PER_RATE
from agents.selector import SHOWN
from daemon.llm_settings import EndpointSettings
from daemon.settings import Settings
from protocol.candidate import LEAST_RACE
from protocol.errors import DataError, SettingsError
from protocol.paths import expanded
from protocol.spec import NAMED_TEXTS

TOKENS_BESIDE_LISTS = 600
"""What the words of a question for lists take."""

log = structlog.get_logger()


def warn_of_texts(settings: Settings) -> None:
    """Say once where a search reports on the text that it searches on."""
    data = settings.data
    if data.report is None or data.fitness in NAMED_TEXTS:
        return
    if expanded(data.report).absolute() == expanded(data.fitness).absolute():
        log.warning("report_is_searched_on", text=data.report)


def check_race(confidence: float | None, first_windows: int | None, windows: int) -> None:
    """Raise DataError where candidates are to race, or to be looked at first, on a text of too few windows."""
    if first_windows is not None and windows <= first_windows:
        raise DataError(
            f"search.first_windows ({first_windows}) must be fewer than those of the fitness text, which has {windows}"
        )
    if confidence is not None and windows <= LEAST_RACE:
        raise DataError(
            f"search.race_confidence needs at least {LEAST_RACE + 1} windows to race on: the fitness text has {windows}"
        )


def check_lists(settings: Settings, endpoints: Sequence[EndpointSettings], units: int) -> None:
    """Raise SettingsError where the longest question for `lists`, with its answer, cannot fit into an endpoint."""
    lists = _most_lists(settings)
    needed = TOKENS_BESIDE_LISTS + lists * units * TOKENS_PER_RATE
    for endpoint in endpoints:
        if lists and endpoint.context is not None and needed > endpoint.context:
            raise SettingsError(
                f"llm.reply `lists` takes about {needed:,} tokens for {lists} lists of {units} rates, and "
                f"{endpoint.name or endpoint.base_url} has {endpoint.context:,}: use `edits` or `trades`, or a smaller "
                "search.population"
            )


def _most_lists(settings: Settings) -> int:
    """Lists that any one question shows and asks for; none where no agent asks for lists."""
    search, llm = settings.search, settings.llm
    if llm.reply != "lists" or search.proposer not in ("llm", "best-of-n"):
        return 0

    def asked(count: int) -> int:
        return min(count, llm.proposals_per_call or count)

    def bred(count: int) -> int:
        return 1 if search.mode == "steady-state" else asked(count)  # each turn asks for one

    first = search.population - len(search.seeds)
    offspring = search.mutations + search.crossovers
    if search.proposer == "best-of-n":
        return max(asked(first), bred(offspring))
    chosen = min(search.population, SHOWN) // 2 if search.selector == "llm" else search.population // 2
    parents = search.population if search.selector == "none" else min(offspring, max(2, chosen))
    lists = [asked(first)] if search.initializer == "llm" else []
    breeders = ((search.mutator, search.mutations), (search.crossover, search.crossovers))
    lists += [parents + bred(count) for agent, count in breeders if agent == "llm" and count and search.rounds]
    return max(lists, default=0)
