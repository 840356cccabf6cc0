"""What stands in Redis of the workers of a search: what they say of themselves, and the jobs that were given up."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from redis.asyncio import Redis

from protocol.queue.keys import Keys


class WorkerStatus(BaseModel):
    """What a worker says of itself with each beat."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    consumer: str = ""
    stage: str
    """`loading`, a stage of preparing (with `done` of `total`), `idle`, `evaluating`, or `unusable` (see `detail`)."""
    done: int = 0
    total: int = 0
    measured: int = 0
    detail: str = ""


@dataclass(frozen=True)
class Workers:
    """The workers that show a sign of life, and the names of those whose status cannot be read."""

    workers: list[WorkerStatus]
    unreadable: frozenset[str]


async def read_workers(redis: Redis, keys: Keys) -> Workers:
    """The workers that show a sign of life; one of another version stops nobody from seeing the others."""
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
    """The jobs that were given up, the last hundred, newest first: `id`, `reason`, `worker`, `detail`."""
    client: Any = redis
    return [fields for _, fields in await client.xrevrange(keys.dead, count=100)]
