"""Checks of settings that need the model's shape, and warnings about questionable settings."""

from collections.abc import Mapping

import structlog

from agents.proposer import TOKENS_PER_RATE
from agents.selector import SHOWN
from daemon.settings.search import SearchSettings
from daemon.settings.settings import Settings
from protocol.errors import DataError, SettingsError
from protocol.plans.spec import NAMED_TEXTS
from protocol.runtime.paths import is_same_file

TOKENS_BESIDE_LISTS = 600
"""Number of tokens in a prompt for lists, in addition to the lists."""
REPORT_ADVICE = "the report says less about other texts; give another text as data.report"
TOKENS_OF_LESSONS = 750
"""Maximum number of tokens of llm.lessons in a prompt."""

log = structlog.get_logger()


def warn_of_texts(settings: Settings) -> None:
    """Warn if a search reports on the text that it searches on."""
    data = settings.data
    if data.report is not None and is_searched_on(data.report, data.fitness):
        log.warning("report_is_searched_on", text=data.report, advice=REPORT_ADVICE)


def is_searched_on(report: str, fitness: str) -> bool:
    """Whether both texts are the same file. False for named texts, which have a separate part for reports."""
    return not {report, fitness} & {*NAMED_TEXTS} and is_same_file(report, fitness)


def check_windows(search: SearchSettings, windows: int) -> None:
    """Raise DataError unless search.first_windows is smaller than the fitness text's number of `windows`."""
    first = search.first_windows
    if first is not None and windows <= first:
        raise DataError(
            f"search.first_windows ({first}) must be smaller than the number of windows of the fitness text ({windows})"
        )


def check_budget(search: SearchSettings, tokens: int) -> None:
    """Raise SettingsError if search.max_tokens does not cover the first population, at `tokens` per candidate."""
    try:
        search.check_first_population(tokens)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def check_lists(settings: Settings, contexts: Mapping[str, int | None], units: int) -> None:
    """Raise SettingsError if the longest prompt for `lists` and its reply do not fit an endpoint's context.

    `contexts` has the context length in tokens of each endpoint name, or None if the length is unknown.
    """
    lists = _most_lists(settings)
    needed = TOKENS_BESIDE_LISTS + lists * units * TOKENS_PER_RATE
    needed += TOKENS_OF_LESSONS if settings.llm.lessons else 0
    for name, context in contexts.items():
        if lists and context is not None and needed > context:
            raise SettingsError(
                f"llm.reply `lists` takes about {needed:,} tokens for {lists} lists of {units} rates, and {name} has "
                f"{context:,}: use `edits` or `moves`, lower search.population, or set its `context` in "
                "llm.endpoints if it is larger"
            )


def check_lists_somewhere(settings: Settings, contexts: Mapping[str, int | None], units: int) -> None:
    """Raise SettingsError like `check_lists`, but only if all contexts are known and the largest is too small.

    Use it for contexts that endpoints report. An endpoint that is unreachable at the start reports no context. If only
    some endpoints have a small context, long questions fail there and are sent to the other endpoints.
    """
    known = [(context, name) for name, context in contexts.items() if context is not None]
    if known and len(known) == len(contexts):
        context, name = max(known)
        check_lists(settings, {name: context}, units)


def _most_lists(settings: Settings) -> int:
    """Return the largest number of lists in one prompt and its reply together; 0 if no agent asks for lists."""
    search, llm = settings.search, settings.llm
    if llm.reply != "lists" or search.proposer not in ("llm", "best-of-n"):
        return 0

    def asked(count: int) -> int:
        return min(count, llm.proposals_per_call or count)

    def bred(count: int) -> int:
        return 1 if search.mode == "steady-state" else asked(count)  # each question asks for one list

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
