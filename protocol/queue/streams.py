"""The daemon's side of the streams: enqueue candidates, read and apply outcomes. jobs.py is the workers' side.

Only these two files and the scripts in protocol/lua change a stream. A message may be delivered several times, but it
takes effect once, because every change is one idempotent script.

Memory grows with the candidates of a search (`candidates`, `issued`, `outcomes`, `applied`: one entry each) and with
its rounds (`selections`: one entry each). Everything else is deleted after use: jobs and results once processed, `done`
when the outcome is applied, `deaths` when the outcome is committed, consumers when their workers have ended. `dead`
keeps the newest 1000 jobs.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import structlog
from pydantic import ValidationError
from redis.asyncio import Redis

from protocol.errors import SelfPrunerError
from protocol.plans.candidate import OUTCOME, Candidate, Failed, KeptSelection, Outcome, Result
from protocol.queue.connection import BLOCK_MILLISECONDS, RedisRetry
from protocol.queue.keys import Keys

TAKEN_OVER, DATA_LOST = -1, -2
"""Answers of a fenced script that refuses: another daemon has taken over, or the server has lost its data."""
FENCE = "fence"
"""Name of the script that is prepended to every script that calls one of the FENCE_FUNCTIONS."""
FENCE_FUNCTIONS = ("refusal(", "epoch_of(")
PART = 500
"""Maximum number of stream entries, ids or candidates in one request. More would block other clients of the server."""

log = structlog.get_logger()


class TakenOver(SelfPrunerError):  # noqa: N818
    """Another daemon is now in charge of this search; this one must not write any more."""


def load_scripts(redis: Redis) -> dict[str, Any]:
    """Register the Lua scripts on `redis` and return them by name. The client reloads them if the server lost them."""
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

    `issued` and `applied` count the candidates and outcomes that the server has confirmed for this search, including
    those of earlier processes. A server that holds fewer has lost data. Every call that changes the search, except
    `requeue`, then waits until SearchStore has restored the data.
    """

    def __init__(self, redis: Redis, keys: Keys, *, epoch: int, fingerprint: str) -> None:
        self._redis: Any = redis  # its annotations cannot say that replies are str
        self._keys = keys
        self._epoch = epoch
        self._fingerprint = fingerprint
        self._scripts = load_scripts(redis)
        self._retry = RedisRetry(redis, keys.jobs)
        self._read_from_start = False
        self.issued = 0
        self.applied = 0

    async def enqueue(self, candidate: Candidate) -> bool:
        """Put `candidate` on the stream. Returns False if its id was enqueued before."""
        keys = [self._keys.epoch, self._keys.candidates, self._keys.issued, self._keys.jobs]
        payload = candidate.model_dump_json()
        args = [self._epoch, candidate.id, payload, self._fingerprint]
        new: int = await self._fenced(lambda: self._scripts["enqueue"](keys, args))
        self.issued += new
        return new == 1

    async def requeue(self, ids: Sequence[str]) -> int:
        """Enqueue candidates again if their job was lost, or if their outcome was lost before it was applied.

        Returns the number of candidates that were enqueued. If the server has lost its data, the call returns at
        once. It must not wait until the data is restored, because the restoration itself calls `requeue`.
        """
        # Jobs are read before results. Otherwise a job that finishes between the two reads would be found in neither.
        jobs, last_job = await self._ids_on(self._keys.jobs)
        results, last_result = await self._ids_on(self._keys.results)
        lost = [id_ for id_ in ids if id_ not in jobs and id_ not in results]
        names = [self._keys.epoch, self._keys.candidates, self._keys.done, self._keys.outcomes, self._keys.jobs]
        names.append(self._keys.results)
        requeued = 0
        for first in range(0, len(lost), PART):
            args = [self._epoch, self._fingerprint, last_job, last_result, *lost[first : first + PART]]
            answer = self._check_answer(await self._retry(partial(self._scripts["requeue"], names, args)))
            if answer == DATA_LOST:
                break
            requeued += answer
        if requeued:
            self.rewind()
        return requeued

    async def _ids_on(self, stream: str) -> tuple[set[str], str]:
        """Return the candidate ids on a stream, and the id of its last entry."""
        ids: set[str] = set()
        last = "0-0"
        while True:
            page = await self._retry(partial(self._redis.xrange, stream, f"({last}", "+", PART))
            ids |= {fields["id"] for _, fields in page if "id" in fields}
            if page:
                last = page[-1][0]
            if len(page) < PART:
                return ids, last

    async def results(self, cursor: str) -> list[Result]:
        """Return the outcomes after `cursor`; wait about a second for the first. Unreadable outcomes become Failed."""
        from_start = self._read_from_start
        streams = {self._keys.results: "0-0" if from_start else cursor}
        reply = await self._retry(lambda: self._redis.xread(streams, count=100, block=BLOCK_MILLISECONDS))
        if reply and from_start:
            self._read_from_start = False
        results = []
        for message, fields in entries_of(reply):
            if "id" in fields:
                results.append(Result(message, fields["id"], _outcome(fields.get("outcome", ""))))
            else:
                log.error("result_unreadable", entry=message)
                await self._retry(partial(self._redis.xdel, self._keys.results, message))
        return results

    async def apply(self, result: Result) -> bool:
        """Make `result` part of the search's state. Returns False if its id already has an outcome."""
        keys = [self._keys.epoch, self._keys.outcomes, self._keys.applied, self._keys.results, self._keys.done]
        args = [self._epoch, result.id, result.outcome.model_dump_json(), result.cursor]
        new: int = await self._fenced(lambda: self._scripts["apply"](keys, args))
        self.applied += new
        return new == 1

    async def remember_selection(self, round_: int, selection: KeptSelection) -> KeptSelection:
        """Store the selection of a round. A daemon that restarts during the round uses the same one.

        Returns the stored selection, which is not `selection` if one had been stored for this round before.
        """
        keys, args = [self._keys.epoch, self._keys.selections], [self._epoch, round_, selection.model_dump_json()]
        kept = read_selection(await self._fenced(lambda: self._scripts["remember_selection"](keys, args)))
        return selection if kept is None else kept

    async def drop(self, result: Result) -> None:
        """Delete a result that belongs to no candidate of this search."""
        keys = [self._keys.epoch, self._keys.results, self._keys.done]
        await self._fenced(lambda: self._scripts["drop"](keys, [self._epoch, result.cursor, result.id]))

    def rewind(self) -> None:
        """Read results from the stream's start next time, because the stream may be new.

        No result is applied twice, because a result is deleted from the stream when it is applied.
        """
        self._read_from_start = True

    async def _fenced(self, script: Callable[[], Awaitable[Any]]) -> Any:
        while (answer := await self._retry(script)) == DATA_LOST:  # noqa: ASYNC110  (it changes on the server)
            await asyncio.sleep(0.5)
        return self._check_answer(answer)

    def _check_answer(self, answer: Any) -> Any:
        if answer == TAKEN_OVER:
            raise TakenOver(f"another daemon has taken over the search {self._keys.search!r}")
        return answer


def read_selection(text: str) -> KeptSelection | None:
    """Return the stored selection of a round; None if it cannot be read."""
    try:
        return KeptSelection.model_validate_json(text)
    except ValidationError:
        return None


def _outcome(text: str) -> Outcome:
    """Parse a committed outcome. An unreadable outcome becomes Failed, because the search waits for an outcome."""
    try:
        return OUTCOME.validate_json(text)
    except ValueError as error:
        log.error("outcome_unreadable", error=str(error)[:200])
        return Failed(reason="invalid", detail="its outcome cannot be read: the worker runs another version")


def entries_of(reply: Any) -> Sequence[tuple[str, dict[str, str]]]:
    """Return the entries of the one stream in a reply to XREAD or XREADGROUP (RESP2 lists, RESP3 dicts)."""
    if not reply:
        return []
    if isinstance(reply, dict):
        (batches,) = reply.values()
        return [(message, fields or {}) for batch in batches for message, fields in batch]
    ((_, entries),) = reply
    return [(message, fields or {}) for message, fields in entries]
