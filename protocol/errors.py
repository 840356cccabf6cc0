"""The errors that one file raises and another handles. Errors used in one file only are defined there.

::

    SelfPrunerError
    ├── UsageError              the user's input is wrong: one sentence, exit code 2
    │   ├── SettingsError       an unknown setting or an invalid value
    │   ├── BudgetError         the pruning rate cannot be reached under the bounds
    │   ├── RuleError           a rule cannot be read, or needs a feature that was not measured
    │   ├── ModelError          the target model is unknown or of an unsupported family
    │   ├── DataError           a text is missing, unreachable or too short
    │   └── SearchExistsError   a search of this name is running, or has other settings
    ├── InvalidReply            a reply of the LLM cannot be used; the message is sent back to it
    ├── EndpointError           an LLM endpoint failed; says whether a retry can help
    └── StoreError              Redis holds something that this version cannot read
"""


class SelfPrunerError(Exception):
    """Base class; `str(error)` is one sentence for a user."""


def first_error(group: BaseExceptionGroup[BaseException]) -> "SelfPrunerError | None":
    """Return the first of our errors in a group, or None. Groups within it are searched, because task groups nest."""
    for error in group.exceptions:
        found = first_error(error) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(found, SelfPrunerError):
            return found
    return None


class UsageError(SelfPrunerError):
    """The input is wrong. The command line prints the sentence and exits with code 2."""


class SettingsError(UsageError):
    """An unknown setting, or an invalid value."""


class BudgetError(UsageError):
    """No pruning rates within the bounds have the requested mean."""


class RuleError(UsageError):
    """A rule cannot be read, or needs a feature that was not measured."""


class ModelError(UsageError):
    """The target model cannot be found, or its family is not supported."""


class DataError(UsageError):
    """A text cannot be read, or is too short for the requested windows."""


class SearchExistsError(UsageError):
    """Another search has this name: with other settings, or still running."""


class InvalidReply(SelfPrunerError):  # noqa: N818  (a reply is invalid; nothing broke)
    """An LLM reply that cannot be used. The message says what was wrong, in the words that the LLM gets back."""


class EndpointError(SelfPrunerError):
    """An LLM endpoint failed. `retryable` says whether a retry can help."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class StoreError(SelfPrunerError):
    """Redis holds something unreadable under one of our keys, or the server is not suitable."""
