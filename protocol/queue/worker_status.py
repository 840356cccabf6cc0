"""The status of each worker of a search in Redis, and the dead-letter jobs."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.asyncio import Redis

from protocol.queue.keys import Keys


class WorkerStatus(BaseModel):
    """The status that a worker sends with each heartbeat. `consumer` is part of the key, not of the value."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    consumer: str = ""
    stage: str
    """`loading`, a stage of preparing (with `done` of `total`), `idle`, `evaluating`, or `unusable` (see `detail`)."""
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    """About how long this stage of preparing still takes, by its own pace; None if that is not known."""
    measured: int = 0
    busy_seconds: float = 0.0
    """How long it has measured candidates."""
    ready_seconds: float = 0.0
    """How long ago its model was ready for the first time; busy_seconds is a part of this."""
    detail: str = ""

    @property
    def is_ready(self) -> bool:
        """Whether the worker measures candidates, or would if there were any."""
        return self.stage in ("idle", "evaluating")

    def to_json(self) -> str:
        """Return the value of the worker's key."""
        return self.model_dump_json(exclude={"consumer"})


@dataclass(frozen=True)
class Workers:
    """The workers with a heartbeat, and the names of those whose status cannot be read."""

    workers: list[WorkerStatus]
    unreadable: frozenset[str]


async def read_workers(redis: Redis, keys: Keys) -> Workers:
    """Read the status of all workers with a heartbeat. A worker of another version does not hide the others."""
    client: Any = redis  # its annotations cannot say that replies are str
    names = [name async for name in client.scan_iter(match=keys.worker_prefix + "*", count=1000)]
    texts = await client.mget(names) if names else []
    workers, unreadable = [], set()
    for name, text in zip(names, texts, strict=True):
        consumer = name.removeprefix(keys.worker_prefix)
        try:
            if text:
                status = WorkerStatus.model_validate_json(text)
                workers.append(status.model_copy(update={"consumer": consumer}))
        except ValidationError:
            unreadable.add(consumer)
    return Workers(workers, frozenset(unreadable))


async def read_dead(redis: Redis, keys: Keys) -> list[dict[str, str]]:
    """Return the newest hundred dead-letter jobs, newest first: `id`, `reason`, `worker`, `detail`."""
    client: Any = redis
    return [fields for _, fields in await client.xrevrange(keys.dead, count=100)]
