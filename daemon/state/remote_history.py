"""The history of a search that another process runs: of what is in Redis, only what is new is read."""

from typing import Any

from redis.asyncio import Redis

from agents.population.population import Population
from daemon.state.history import entries, read_candidate, read_counters, read_outcome
from protocol.plans.candidate import Candidate
from protocol.queue.keys import Keys


class RemoteHistory:
    """`ledger`, `population` and `counters` as they were at the last `read`."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._begin()

    async def read(self) -> bool:
        """Catch up; False when the search in Redis is another one than the last time, or was emptied.

        Damaged entries are left out, as the daemon does at its next start.
        """
        pipe = self._redis.pipeline(transaction=True)  # one moment, while the search goes on
        pipe.llen(self._keys.issued).llen(self._keys.applied).hgetall(self._keys.state)
        issued, applied, state = await pipe.execute()
        if issued < self._issued or applied < self._applied:
            self._begin()
            await self.read()
            return False
        async for id_, text in entries(
            self._redis, self._keys.issued, self._keys.candidates, start=self._issued, stop=issued
        ):
            self._issued += 1
            if candidate := read_candidate(self._keys, id_, text):
                self.ledger[id_] = candidate
        async for id_, text in entries(
            self._redis, self._keys.applied, self._keys.outcomes, start=self._applied, stop=applied
        ):
            self._applied += 1
            outcome = read_outcome(self._keys, id_, text)
            if outcome and id_ in self.ledger and id_ not in self.population:
                self.population.insert(self.ledger[id_], outcome)
        self.counters.update(read_counters(state))
        return True

    def _begin(self) -> None:
        self._issued = self._applied = 0
        self.ledger: dict[str, Candidate] = {}
        self.population: Population = Population()
        self.counters: dict[str, float] = {}
