"""Looking at a search from another process, and steering it: status, best, pause, resume, stop."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from agents.population import Population
from daemon.embedded import embedded_url
from daemon.journal import best_record
from daemon.store import load_history, read_dead, read_workers
from protocol.candidate import Measured
from protocol.card import ModelCard
from protocol.connection import AWAY, connect
from protocol.control import Command, Control
from protocol.errors import UsageError
from protocol.keys import Keys, check_search_name
from protocol.spec import SearchSpec


class RemoteSearch:
    """A search in a Redis server that answers."""

    def __init__(self, redis: Redis, keys: Keys, spec: SearchSpec) -> None:
        self._redis = redis
        self._keys = keys
        self._spec = spec

    async def status(self) -> dict[str, Any]:
        """How far it is: its command, its daemon and workers, its candidates and its best."""
        client: Any = self._redis
        history = await load_history(self._redis, self._keys)
        population = _population(history.ledger, history.outcomes)
        best = population.best()
        measured = best.outcome if best and isinstance(best.outcome, Measured) else None
        proposals = [c.provenance for c in history.ledger.values() if c.provenance.agent != "baseline"]
        return {
            "search": self._keys.search,
            "model": self._spec.model,
            "rate": self._spec.rate,
            "control": await Control(self._redis, self._keys).read(),
            "daemon": await client.get(self._keys.daemon),
            "workers": [w.model_dump() for w in await read_workers(self._redis, self._keys)],
            "round": max((p.round for p in proposals), default=0),
            "candidates": len(proposals),
            "waiting": len(history.ledger) - len(history.outcomes),
            "failed": sum(outcome.kind == "failed" for outcome in history.outcomes.values()),
            "dead": await read_dead(self._redis, self._keys),
            "fitness": self._spec.measure,
            "best_perplexity": measured and measured.perplexity,
            "best_kl": measured and measured.kl,
            "seconds": round(history.counters.get("seconds", 0.0), 1),
        }

    async def best(self) -> dict[str, Any]:
        """The best candidate so far, as best.json has it."""
        history = await load_history(self._redis, self._keys)
        best = _population(history.ledger, history.outcomes).top(1)
        if not best:
            raise UsageError(f"the search {self._keys.search!r} has measured no candidate yet")
        client: Any = self._redis
        card = ModelCard.model_validate_json(await client.get(self._keys.card))
        return best_record(self._keys.search, self._spec, card.shape, best[0])

    async def command(self, command: Command) -> dict[str, Any]:
        """Command run, pause or stop."""
        await Control(self._redis, self._keys).write(command)
        return {"search": self._keys.search, "control": command}


@asynccontextmanager
async def open_remote(search: str, redis_url: str | None, folder: Path) -> AsyncIterator[RemoteSearch]:
    """The search called `search` under `redis_url`, or in its embedded server; UsageError if there is none."""
    keys = Keys(check_search_name(search))
    url = redis_url or embedded_url(folder / search)
    redis = connect(url)
    client: Any = redis
    try:
        text = await client.get(keys.spec)
    except AWAY as error:
        await redis.aclose()
        hint = "" if redis_url else f"; it is not running in {folder}/, or give --redis-url"
        raise NotRunning(f"no server answers for the search {search!r} ({error}){hint}") from error
    try:
        if text is None:
            raise UsageError(f"there is no search {search!r} in this Redis")
        yield RemoteSearch(redis, keys, SearchSpec.model_validate_json(text))
    finally:
        await redis.aclose()


class NotRunning(UsageError):  # noqa: N818
    """The search's server does not answer."""


def saved(folder: Path, file: str) -> dict[str, Any] | None:
    """What the search in `folder` wrote to `file` when it ran, if it did."""
    path = folder / file
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    return record if isinstance(record, dict) else None


def _population(ledger: dict[str, Any], outcomes: dict[str, Any]) -> Population:
    population = Population()
    for candidate_id, outcome in outcomes.items():
        population.insert(ledger[candidate_id], outcome)
    return population
