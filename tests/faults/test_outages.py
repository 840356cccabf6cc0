"""Logging of outages: one line at the beginning and one at the end, however many operations wait."""

import asyncio
import json
from collections import Counter
from typing import Any

from structlog.testing import capture_logs

from protocol.queue.connection import RedisRetry, connect
from tests.faults.kit import Kit, eventually
from tests.faults.marks import fault
from tests.faults.searching import Search
from tests.support.servers import Server

TOLD = ("redis_unreachable", "redis_back")


def told(logs: list[Any]) -> list[str]:
    return [line["event"] for line in logs if line["event"] in TOLD]


class Callers:
    """Several callers that wait for one server, each with its own RedisRetry."""

    def __init__(self, server: Server, count: int) -> None:
        self.redis: Any = connect(server.url)
        self.patience = [RedisRetry(self.redis, f"key-{i}", longest_wait=0.2) for i in range(count)]

    def write(self) -> "list[asyncio.Task[Any]]":
        return [asyncio.ensure_future(retry(lambda: self.redis.set("a", "1"))) for retry in self.patience]

    async def all_wait(self) -> bool:
        return all(retry.outages for retry in self.patience)


async def test_an_outage_is_logged_once_however_many_wait_on_one_client(own_server: Server) -> None:
    callers = Callers(own_server, 5)
    with capture_logs() as logs:
        for outage in (1, 2):
            await asyncio.gather(*callers.write())
            own_server.kill()
            writing = callers.write()
            await eventually(callers.all_wait)
            assert told(logs) == [*TOLD * (outage - 1), TOLD[0]]
            own_server.start()
            await asyncio.gather(*writing)
            for retry in callers.patience:
                retry.outages = 0
    assert told(logs) == [*TOLD, *TOLD]
    await callers.redis.aclose()


async def test_a_successful_read_does_not_end_an_outage_of_writing(own_server: Server) -> None:
    callers = Callers(own_server, 3)
    await callers.redis.config_set("maxmemory", "1")
    with capture_logs() as logs:
        writing = callers.write()
        await eventually(callers.all_wait)
        for retry in callers.patience:
            await retry(lambda: callers.redis.get("a"))
        assert told(logs) == ["redis_unreachable"]
        await callers.redis.config_set("maxmemory", "0")
        await asyncio.gather(*writing)
    assert told(logs) == [*TOLD]
    await callers.redis.aclose()


async def test_an_outage_in_which_all_gave_up_waiting_is_over_when_anything_succeeds(own_server: Server) -> None:
    callers = Callers(own_server, 2)
    with capture_logs() as logs:
        own_server.kill()
        writing = callers.write()
        await eventually(callers.all_wait)
        for task in writing:
            task.cancel()
        await asyncio.wait(writing)
        own_server.start()
        await asyncio.gather(*callers.write())
    assert told(logs) == [*TOLD]
    await callers.redis.aclose()


@fault("15", "the server is killed under a daemon", "SIGKILL, then started", "told once, back told once")
async def test_a_daemon_logs_an_outage_once_and_its_end_once(kit: Kit, search: Search) -> None:
    daemon, worker = await search.begun("sleep:0.1")
    await search.has_applied(4)
    kit.server.kill()
    await asyncio.sleep(3)  # all that looks at Redis now and then has looked
    kit.server.start()
    kit.disturbed["*"] = 1
    assert await asyncio.wait_for(daemon.wait(), 120) == 0
    for lines in (search.out / "log.jsonl", worker.log):
        events = Counter(json.loads(line)["event"] for line in lines.read_text().splitlines())
        assert [events[event] for event in TOLD] == [1, 1]
