"""The history of a search that another process runs: of what is in Redis, only what is new is read."""

from typing import Any

from redis.asyncio import Redis

from agents.population import Population
from protocol.candidate import OUTCOME, Candidate
from protocol.errors import StoreError
from protocol.keys import Keys


class RemoteHistory:
    """`ledger`, `population` and `counters` as they were at the last `read`."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._begin()

    async def read(self) -> bool:
        """Catch up; False when the search in Redis is another one than the last time, or was emptied."""
        pipe = self._redis.pipeline(transaction=True)  # one moment, while the search goes on
        pipe.llen(self._keys.issued).lrange(self._keys.issued, len(self.ledger), -1)
        pipe.lrange(self._keys.applied, self._applied, -1).hgetall(self._keys.state)
        length, issued, applied, state = await pipe.execute()
        if length < len(self.ledger):
            self._begin()
            await self.read()
            return False
        try:
            for id_, text in await self._texts(self._keys.candidates, issued):
                self.ledger[id_] = Candidate.model_validate_json(text)
            for id_, text in await self._texts(self._keys.outcomes, applied):
                self.population.insert(self.ledger[id_], OUTCOME.validate_json(text))
                self._applied += 1
            self.counters.update((name, float(value)) for name, value in state.items() if name != "cursor")
        except (KeyError, ValueError) as error:
            raise StoreError(f"the search {self._keys.search!r} in Redis was written by another version") from error
        return True

    async def _texts(self, key: str, ids: list[str]) -> list[tuple[str, str]]:
        texts = await self._redis.hmget(key, ids) if ids else []
        return [(id_, text or "") for id_, text in zip(ids, texts, strict=True)]

    def _begin(self) -> None:
        self._applied: int = 0
        self.ledger: dict[str, Candidate] = {}
        self.population: Population = Population()
        self.counters: dict[str, float] = {}
