"""Every Redis key and stream of a search, in one place."""

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
        """String: the text that the model of this spec wrote itself (self_text.py), by the first worker."""
        return self["self-text:"] + fingerprint

    @property
    def control(self) -> str:
        """String: `run`, `pause` or `stop`; absent means run. People set it by hand."""
        return self["control"]

    @property
    def understood(self) -> str:
        """String: the last command that was understood, for who finds one that is not."""
        return self["understood"]

    @property
    def candidates(self) -> str:
        """Hash id -> Candidate JSON: the ledger of everything ever enqueued, and what makes enqueueing idempotent."""
        return self["candidates"]

    @property
    def issued(self) -> str:
        """List of ids in the order of enqueueing."""
        return self["issued"]

    @property
    def jobs(self) -> str:
        """Stream of candidates to measure, read by the group of workers."""
        return self["jobs"]

    @property
    def results(self) -> str:
        """Stream of outcomes, deleted as the population keeper applies them."""
        return self["results"]

    @property
    def done(self) -> str:
        """Hash id -> consumer whose outcome was first, and therefore counts; kept until the outcome is applied."""
        return self["done"]

    @property
    def deaths(self) -> str:
        """Hash id -> how often a worker or its evaluation process died on it; kept until its outcome is committed."""
        return self["deaths"]

    @property
    def dead(self) -> str:
        """Stream of the jobs that were given up (id, reason, worker, detail), the newest thousand: for people."""
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
        """Where a daemon writes what belongs under `key` of a server that lost its data (daemon/state/restoring.py)."""
        return key + ":restoring"

    @property
    def epoch(self) -> str:
        """Number that grows: which daemon may write (lua/fence.lua). A daemon with a lower one is refused."""
        return self["epoch"]

    @property
    def daemon(self) -> str:
        """String with expiry: who the running daemon is."""
        return self["daemon"]

    @property
    def condition(self) -> str:
        """String: the daemon's Condition as JSON (daemon/monitor/status.py): what only it knows; stays when it ends."""
        return self["condition"]

    @property
    def worker_prefix(self) -> str:
        """Keys `…:worker:<consumer>` with expiry: a worker's status, and the proof that it lives."""
        return self["worker:"]

    def worker(self, consumer: str) -> str:
        """The status key of one worker."""
        return self.worker_prefix + consumer


T = TypeVar("T")


M = TypeVar("M", bound=BaseModel)


@overload
def read_stored(model: type[M], text: str, key: str) -> M: ...


@overload
def read_stored(model: TypeAdapter[T], text: str, key: str) -> T: ...


def read_stored(model: type[BaseModel] | TypeAdapter[Any], text: str, key: str) -> Any:
    """The value that `text`, found under `key`, stands for; StoreError where it is none that this version knows."""
    try:
        return model.validate_json(text) if isinstance(model, TypeAdapter) else model.model_validate_json(text)
    except ValidationError:
        raise StoreError(
            f"what stands under {key} in Redis cannot be read: another version, or somebody by hand, has written it"
        ) from None


def read_entry(model: type[M] | TypeAdapter[T], text: str, key: str) -> M | T | None:
    """As `read_stored`, but None for what no version of ours has written: no JSON object, or no UTF-8."""
    try:
        return read_stored(model, text, key)
    except StoreError:
        if is_damaged(text):
            return None
        raise


def is_damaged(text: str) -> bool:
    """Whether a value that cannot be read is damaged, where it could be another version's."""
    try:
        return "\ufffd" in text or not isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return True
