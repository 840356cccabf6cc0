"""The errors that cross a boundary between files. Those of one file alone are defined there.

::

    SelfPrunerError
    ├── UsageError              the user's input is wrong: one sentence, exit code 2
    │   ├── SettingsError       an unknown or impossible setting
    │   ├── BudgetError         the pruning rate cannot be reached under the bounds
    │   ├── ModelError          the target model is unknown or of an unsupported family
    │   ├── DataError           a text is missing, unreachable or too short
    │   └── SearchExistsError   the name is taken by a search with other settings, or is running
    ├── InvalidReply            what the LLM answered cannot be used; carries the sentence it gets back
    ├── EndpointError           an LLM endpoint failed; says whether trying again can help
    └── StoreError              Redis holds something that this version cannot read
"""


class SelfPrunerError(Exception):
    """Base of all of them; `str(error)` is one sentence for a person."""


def first_error(group: BaseExceptionGroup[BaseException]) -> "SelfPrunerError | None":
    """The first of our errors in a group, however deep: task groups wrap, and wrap again."""
    for error in group.exceptions:
        found = first_error(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, SelfPrunerError):
            return found
    return None


class UsageError(SelfPrunerError):
    """The input is wrong. The command line prints the sentence and exits with code 2."""


class SettingsError(UsageError):
    """An unknown setting, or a value that cannot be."""


class BudgetError(UsageError):
    """No pruning rates within the bounds have the mean that was asked for."""


class ModelError(UsageError):
    """The target model cannot be found, or its family is not supported."""


class DataError(UsageError):
    """A text cannot be had or is too short for the windows asked for."""


class SearchExistsError(UsageError):
    """Another search has this name: with other settings, or still running."""


class InvalidReply(SelfPrunerError):  # noqa: N818  (a reply is invalid; nothing broke)
    """An LLM reply that cannot be used; the text says what was wrong, as the LLM is told."""


class EndpointError(SelfPrunerError):
    """An LLM endpoint failed. `retryable` says whether asking it again can help."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class StoreError(SelfPrunerError):
    """Redis holds something unreadable under one of our keys, or is not the server we need."""
