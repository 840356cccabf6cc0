"""The Redis keys and streams of a search, and the parsing of their values."""

import json
import re
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from pydantic import BaseModel, TypeAdapter, ValidationError

from protocol.errors import SettingsError, StoreError

PREFIX = "selfpruner"
GROUP = "workers"
SEARCH_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_search_name(name: str) -> str:
    """Return `name` if it may name a search (and a folder), else raise SettingsError."""
    if not SEARCH_NAME.fullmatch(name):
        raise SettingsError(
            f"search.name {name!r} is not allowed: use 1 to 64 letters, digits, dots, dashes and underscores, "
            "starting with a letter or a digit"
        )
    return name


@dataclass(frozen=True)
class Keys:
    """The keys of the search called `search`."""

    search: str

    def __getitem__(self, part: str) -> str:
        return f"{PREFIX}:{self.search}:{part}"

    @property
    def spec(self) -> str:
        """String: the SearchSpec as JSON. Workers wait for it."""
        return self["spec"]

    @property
    def profile(self) -> str:
        """String: the ModelProfile as JSON, published by the first worker (protocol/queue/profile_board.py)."""
        return self["profile"]

    def self_text(self, fingerprint: str) -> str:
        """String: the text that this spec's model generated, published by the first worker (self_text.py)."""
        return self["self-text:"] + fingerprint

    @property
    def control(self) -> str:
        """String: `run`, `pause` or `stop`; absent means run. Users may set it directly."""
        return self["control"]

    @property
    def last_command(self) -> str:
        """String: the last valid command, which stays in force while `control` holds an invalid command."""
        return self["understood"]

    @property
    def candidates(self) -> str:
        """Hash id -> Candidate JSON: every candidate ever enqueued. It makes enqueueing idempotent."""
        return self["candidates"]

    @property
    def issued(self) -> str:
        """List of candidate ids in the order in which they were enqueued."""
        return self["issued"]

    @property
    def jobs(self) -> str:
        """Stream of candidates to measure, read by the group of workers."""
        return self["jobs"]

    @property
    def results(self) -> str:
        """Stream of outcomes. The population keeper deletes each outcome when it applies it."""
        return self["results"]

    @property
    def done(self) -> str:
        """Hash id -> consumer that committed the first outcome, which counts; kept until the outcome is applied."""
        return self["done"]

    @property
    def deaths(self) -> str:
        """Hash id -> number of workers or evaluation processes that died on it; kept until its outcome is committed."""
        return self["deaths"]

    @property
    def dead(self) -> str:
        """Stream of the newest thousand dead-letter jobs (id, reason, worker, detail), for inspection."""
        return self["dead"]

    @property
    def selections(self) -> str:
        """Hash round -> the parents that the Selector chose for it."""
        return self["selections"]

    @property
    def outcomes(self) -> str:
        """Hash id -> Outcome JSON, applied by the population keeper."""
        return self["outcomes"]

    @property
    def applied(self) -> str:
        """List of ids in the order in which their outcomes were applied."""
        return self["applied"]

    @property
    def state(self) -> str:
        """Hash: counters and times of the search (daemon/state/store.py)."""
        return self["state"]

    def restoring(self, key: str) -> str:
        """Temporary key for the value of `key` while a daemon restores lost data (daemon/state/restoring.py)."""
        return key + ":restoring"

    @property
    def epoch(self) -> str:
        """Fencing token: a growing number. A daemon with a lower number may not write (lua/fence.lua)."""
        return self["epoch"]

    @property
    def daemon(self) -> str:
        """String with expiry: the identity of the running daemon."""
        return self["daemon"]

    @property
    def condition(self) -> str:
        """String: the daemon's Condition as JSON (daemon/monitor/status.py). It is kept after the daemon has ended."""
        return self["condition"]

    @property
    def worker_prefix(self) -> str:
        """Prefix of the keys `…:worker:<consumer>`. Each holds a worker's status and expires if its heartbeats stop."""
        return self["worker:"]

    def worker(self, consumer: str) -> str:
        """The status key of one worker."""
        return self.worker_prefix + consumer


T = TypeVar("T")


M = TypeVar("M", bound=BaseModel)


@overload
def parse_stored(model: type[M], text: str, key: str) -> M: ...


@overload
def parse_stored(model: TypeAdapter[T], text: str, key: str) -> T: ...


def parse_stored(model: type[BaseModel] | TypeAdapter[Any], text: str, key: str) -> Any:
    """Parse `text`, the value of `key`. Raises StoreError if it does not fit this version's model."""
    try:
        return model.validate_json(text) if isinstance(model, TypeAdapter) else model.model_validate_json(text)
    except ValidationError:
        raise StoreError(
            f"the Redis key {key} cannot be read: its value was written by another version, or by hand"
        ) from None


def parse_unless_damaged(model: type[M] | TypeAdapter[T], text: str, key: str) -> M | T | None:
    """Parse `text` like `parse_stored`, but return None if it is damaged: not a JSON object, or not UTF-8."""
    try:
        return parse_stored(model, text, key)
    except StoreError:
        if is_damaged(text):
            return None
        raise


def is_damaged(text: str) -> bool:
    """Whether an unreadable value is damaged. Otherwise another version wrote it."""
    try:
        return "\ufffd" in text or not isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return True
