"""Rules and seeds as users name them: `default`, a file, or the rule itself."""

import json
from pathlib import Path
from typing import get_args

from protocol.errors import DataError, RuleError
from protocol.plans.allocation import Allocation, Method
from protocol.plans.rule import DEFAULT_RULE, Rule

LARGEST_FILE = 10_000_000
"""Maximum number of characters of a file with rules."""
PREFIX = "rule:"


def read_rule(given: str) -> Rule:
    """Return the rule that `given` names.

    It is `default`, the path of a file with one rule (lines that begin with # are comments), the path of a search's
    rules.json, of which the best rule is taken, or the rule itself. Raises RuleError, and DataError for a file that
    cannot be read.
    """
    if given == "default":
        return DEFAULT_RULE
    path = _path(given)
    if not _is_file(path):
        if path.suffix in (".txt", ".json", ".rule"):
            raise RuleError(f"there is no rule file {given!r}")
        try:
            return Rule.parse(given)
        except RuleError as error:
            raise RuleError(f"{given[:60]!r} is neither `default` nor a file, and as a rule: {error}") from None
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_FILE)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DataError(f"the rule file {str(path)!r} cannot be read: {reason}") from error
    if path.suffix == ".json":
        return _best_rule(text, path)
    try:
        return Rule.parse(" ".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    except RuleError as error:
        raise RuleError(f"{path}: {error}") from None


def _path(given: str) -> Path:
    try:
        return Path(given).expanduser()
    except RuntimeError:  # a user without a home
        return Path(given)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the text of a rule may be too long for a file's name
        return False


def _best_rule(text: str, path: Path) -> Rule:
    """Return the first rule of a search's rules.json, which is its best."""
    try:
        first = json.loads(text)["rules"][0]["rule"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{path} holds no rules of a search") from error
    return Rule.parse(str(first))


def seed_allocation(seed: str) -> Allocation:
    """Return the allocation of an entry of search.seeds: a method, or `rule:` and what `read_rule` takes.

    Raises ValueError for an unknown method, RuleError and DataError as `read_rule` does.
    """
    if seed.startswith(PREFIX):
        return Allocation(method="rule", rule=read_rule(seed.removeprefix(PREFIX).strip()))
    known = [method for method in get_args(Method) if method != "mip"]  # a search does not measure so many sizes
    if seed not in known:
        raise ValueError(f"{seed!r} is no allocation: give {', '.join(known)} or rule:NAME")
    return Allocation(method=seed)
