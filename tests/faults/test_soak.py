"""200,000 instant evaluations, and nothing is left of them but their searches' ledgers."""

import asyncio
import gc
from typing import Any

import psutil
import pytest

from benchmarks.micro.queue_overhead import instant_workers
from protocol.queue.keys import GROUP
from tests.faults.kit import Kit
from tests.faults.marks import slow_fault
from tests.support.samples import candidate

SEARCHES, EACH = 10, 20_000
IN_FLIGHT = 60
ALLOWED_GROWTH_MB = 20


@pytest.mark.timeout(2400)
@slow_fault("33", "wear", "200,000 instant evaluations in 10 searches", "streams, keys, memory, fds flat")
async def test_two_hundred_thousand_evaluations_leave_nothing_behind(kit: Kit) -> None:
    if "redis-server" in str(kit.server.process.args):
        pytest.skip("on Valkey alone: it takes long, and leaks of ours do not depend on the server")
    one = candidate((0.3,) * 4)
    samples: list[dict[str, Any]] = []
    with instant_workers(kit.server.url, 2, kit.keys.search):
        for search in range(SEARCHES):
            daemon = await kit.daemon()

            async def send(number: int) -> None:
                await daemon.issue([one.model_copy(update={"id": f"{number:016x}"})])  # noqa: B023

            for start in range(search * EACH, (search + 1) * EACH, IN_FLIGHT // 3):
                await asyncio.gather(*(send(number) for number in range(start, start + IN_FLIGHT // 3)))
                while len(daemon.ledger) - daemon.population.outcomes > IN_FLIGHT:
                    await asyncio.sleep(0.001)
            await daemon.settled(120)
            samples.append(await _sample(kit))
            await daemon.end()
            kit.daemons.clear()
            await kit.redis.delete(*(kit.keys[part] for part in ("issued", "candidates", "outcomes", "applied")))
    for sample in samples:
        assert sample["outcomes"] == EACH
        assert (sample["jobs"], sample["results"], sample["pending"]) == (0, 0, 0)
        assert sample["consumers"] == 2
    settled = samples[2:]  # the first ones fill caches
    assert max(s["keys"] for s in settled) == min(s["keys"] for s in settled)
    assert max(s["fds"] for s in settled) - min(s["fds"] for s in settled) <= 4
    growth = settled[-1]["megabytes"] - settled[0]["megabytes"]
    assert growth < ALLOWED_GROWTH_MB, [s["megabytes"] for s in samples]


async def _sample(kit: Kit) -> dict[str, Any]:
    gc.collect()
    process = psutil.Process()
    groups = await kit.redis.xinfo_groups(kit.keys.jobs)
    (group,) = [group for group in groups if group["name"] == GROUP]
    return {
        "outcomes": await kit.redis.hlen(kit.keys.outcomes),
        "jobs": await kit.redis.xlen(kit.keys.jobs),
        "results": await kit.redis.xlen(kit.keys.results),
        "pending": group["pending"],
        "consumers": group["consumers"],
        "keys": len([key async for key in kit.redis.scan_iter(count=1000) if await kit.redis.ttl(key) == -1]),
        "megabytes": process.memory_info().rss / 1e6,
        "fds": process.num_fds(),
    }
