"""The daemon's end of the streams: enqueue candidates, read and apply outcomes. jobs.py is the workers' end.

Only these two files and the scripts beside them (protocol/lua) touch a stream. Delivery is at least once and effects
are once: every step that changes something is one script that may be repeated without harm.

What grows with a search is its ledger and its outcomes alone (`candidates`, `issued`, `outcomes`, `applied`: one entry
for each candidate), and `selections` by one entry a round. Jobs and results are deleted when they have served, `done`
when the outcome is applied, `deaths` when it is committed, workers when they are gone; `dead` keeps the newest 1000.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import structlog
from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis

from protocol.errors import SelfPrunerError
from protocol.plans.candidate import OUTCOME, Candidate, Failed, Outcome, Result
from protocol.queue.connection import BLOCK_MILLISECONDS, Patience
from protocol.queue.keys import Keys

TAKEN_OVER, DATA_LOST = -1, -2
"""What a fenced script answers when another daemon is in charge, and when nobody is: the server lost its data."""
FENCE = "fence"
"""The script that stands before each one that asks who is in charge, with one of its functions."""
FENCE_FUNCTIONS = ("refusal(", "epoch_of(")
PART = 500
"""Entries of a stream, ids or candidates in one request: more would keep the server from other clients."""
PARENTS: TypeAdapter[tuple[str, ...]] = TypeAdapter(tuple[str, ...])

log = structlog.get_logger()


class TakenOver(SelfPrunerError):  # noqa: N818
    """Another daemon is in charge of this search now; this one must not write any more."""


def load_scripts(redis: Redis) -> dict[str, Any]:
    """The Lua scripts by name, registered on `redis` (loaded again where the server has forgotten them)."""
    folder = files("protocol") / "lua"
    texts = {
        script.name.removesuffix(".lua"): script.read_text()
        for script in folder.iterdir()
        if script.name.endswith(".lua")
    }
    fence = texts.pop(FENCE)
    fenced = {name for name, text in texts.items() if any(function in text for function in FENCE_FUNCTIONS)}
    return {name: redis.register_script(fence + text if name in fenced else text) for name, text in texts.items()}


class CandidateQueue:
    """Puts candidates on the job stream and applies outcomes, fenced by its epoch.

    `issued` and `applied` count what the server has confirmed of this search, earlier processes included: a server
    that holds less has lost something. While its data is lost every call but `requeue` waits for SearchStore to restore
    it.
    """

    def __init__(self, redis: Redis, keys: Keys, *, epoch: int, fingerprint: str) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._epoch = epoch
        self._fingerprint = fingerprint
        self._scripts = load_scripts(redis)
        self._patiently = Patience(redis, keys.jobs)
        self._from_the_start = False
        self.issued = 0
        self.applied = 0

    async def enqueue(self, candidate: Candidate) -> bool:
        """Put `candidate` on the stream; False when its id is there (or was measured) already."""
        keys = [self._keys.epoch, self._keys.candidates, self._keys.issued, self._keys.jobs]
        payload = candidate.model_dump_json()
        args = [self._epoch, candidate.id, payload, self._fingerprint]
        new: int = await self._fenced(lambda: self._scripts["enqueue"](keys, args))
        self.issued += new
        return new == 1

    async def requeue(self, ids: Sequence[str]) -> int:
        """Put those candidates back whose job was lost, or whose outcome was before it was applied; returns how many.

        Of a server that has lost its data it returns 0 at once, for whoever restores calls this too.
        """
        jobs, last_job = await self._ids_on(self._keys.jobs)  # first: a job that is done meanwhile is on the other then
        results, last_result = await self._ids_on(self._keys.results)
        lost = [id_ for id_ in ids if id_ not in jobs and id_ not in results]
        names = [self._keys.epoch, self._keys.candidates, self._keys.done, self._keys.outcomes, self._keys.jobs]
        names.append(self._keys.results)
        requeued = 0
        for first in range(0, len(lost), PART):
            args = [self._epoch, self._fingerprint, last_job, last_result, *lost[first : first + PART]]
            answer = self._checked(await self._patiently(partial(self._scripts["requeue"], names, args)))
            if answer == DATA_LOST:
                break
            requeued += answer
        if requeued:
            self.rewind()
        return requeued

    async def _ids_on(self, stream: str) -> tuple[set[str], str]:
        """The candidates on a stream, and its last entry, read in parts."""
        ids: set[str] = set()
        last = "0-0"
        while True:
            page = await self._patiently(partial(self._redis.xrange, stream, f"({last}", "+", PART))
            ids |= {fields["id"] for _, fields in page if "id" in fields}
            if page:
                last = page[-1][0]
            if len(page) < PART:
                return ids, last

    async def results(self, cursor: str) -> list[Result]:
        """Outcomes behind `cursor`, waiting about a second for the first; an unreadable one has failed."""
        from_the_start = self._from_the_start
        streams = {self._keys.results: "0-0" if from_the_start else cursor}
        reply = await self._patiently(lambda: self._redis.xread(streams, count=100, block=BLOCK_MILLISECONDS))
        if reply and from_the_start:
            self._from_the_start = False
        results = []
        for message, fields in entries_of(reply):
            if "id" in fields:
                results.append(Result(message, fields["id"], _outcome(fields.get("outcome", ""))))
            else:
                log.error("result_unreadable", entry=message)
                await self._patiently(partial(self._redis.xdel, self._keys.results, message))
        return results

    async def apply(self, result: Result) -> bool:
        """Make `result` part of the search's state; False when its id has an outcome already."""
        keys = [self._keys.epoch, self._keys.outcomes, self._keys.applied, self._keys.results, self._keys.done]
        args = [self._epoch, result.id, result.outcome.model_dump_json(), result.cursor]
        new: int = await self._fenced(lambda: self._scripts["apply"](keys, args))
        self.applied += new
        return new == 1

    async def remember_selection(self, round_: int, parents: Sequence[str]) -> tuple[str, ...]:
        """Keep the parents chosen for a round, so that a restart in its middle goes on with the same ones.

        Returns those that are kept: the first that were chosen.
        """
        keys, args = [self._keys.epoch, self._keys.selections], [self._epoch, round_, json.dumps(parents)]
        kept = read_parents(await self._fenced(lambda: self._scripts["remember_selection"](keys, args)))
        return tuple(parents) if kept is None else kept

    async def drop(self, result: Result) -> None:
        """Take a result off its stream that belongs to no candidate of this search."""
        keys = [self._keys.epoch, self._keys.results, self._keys.done]
        await self._fenced(lambda: self._scripts["drop"](keys, [self._epoch, result.cursor, result.id]))

    def rewind(self) -> None:
        """Read results from the first on, for the stream may have begun anew; those applied are not on it any more."""
        self._from_the_start = True

    async def _fenced(self, script: Callable[[], Awaitable[Any]]) -> Any:
        while (answer := await self._patiently(script)) == DATA_LOST:  # noqa: ASYNC110  (it changes on the server)
            await asyncio.sleep(0.5)
        return self._checked(answer)

    def _checked(self, answer: Any) -> Any:
        if answer == TAKEN_OVER:
            raise TakenOver(f"another daemon has taken over the search {self._keys.search!r}")
        return answer


def read_parents(text: str) -> tuple[str, ...] | None:
    """The parents of a round as they are stored; None where they cannot be read."""
    try:
        return PARENTS.validate_json(text)
    except ValidationError:
        return None


def _outcome(text: str) -> Outcome:
    """An outcome as committed; one that cannot be read has failed, for the search waits for it."""
    try:
        return OUTCOME.validate_json(text)
    except ValueError as error:
        log.error("outcome_unreadable", error=str(error)[:200])
        return Failed(reason="invalid", detail="its outcome cannot be read: the worker is of another version")


def entries_of(reply: Any) -> Sequence[tuple[str, dict[str, str]]]:
    """The entries of the one stream in a reply to XREAD or XREADGROUP (RESP2 lists, RESP3 dicts)."""
    if not reply:
        return []
    if isinstance(reply, dict):
        (batches,) = reply.values()
        return [(message, fields or {}) for batch in batches for message, fields in batch]
    ((_, entries),) = reply
    return [(message, fields or {}) for message, fields in entries]
