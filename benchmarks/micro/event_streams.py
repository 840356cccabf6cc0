"""What clients of the event stream cost a search: outcomes per second without and with them, and how late events are.

    python -m benchmarks.micro.event_streams [--clients 200] [--seconds 10] [--repeats 3]

Only the evaluation is fake, and instant. The server, the daemon's queue and keeper, the observer, the HTTP API, one
worker and the clients are real; worker and clients are processes of their own. Without and with clients take turns.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path

import aiohttp

from benchmarks.micro.queue_overhead import KEYS, Side, instant_workers, measure
from daemon.http_api.api import MAX_EVENT_STREAMS
from daemon.monitor.observer import Observer
from daemon.settings.service import HttpSettings
from daemon.state.history import History
from tests.support.http_client import TOKEN, served
from tests.support.samples import SPEC
from tests.support.servers import server_binary, temporary_server


async def listen(url: str, count: int) -> None:
    """Follow the events with `count` clients, until the server ends. Prints a line when all are connected."""
    timeout, headers = aiohttp.ClientTimeout(total=None), {"Authorization": f"Bearer {TOKEN}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers, connector=connector) as session:
        replies = [await session.get(f"{url}/api/events") for _ in range(count)]
        print("connected" if all(reply.status == 200 for reply in replies) else "refused", flush=True)
        await asyncio.gather(*(reply.read() for reply in replies))


@asynccontextmanager
async def clients(url: str, count: int) -> AsyncIterator[None]:
    """Have a process with `count` clients."""
    command = [sys.executable, "-m", "benchmarks.micro.event_streams", "--listen", url, "--clients", str(count)]
    process = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if await process.stdout.readline() != b"connected\n":
            raise SystemExit("the clients could not connect")
        yield
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def observed(side: Side, folder: Path) -> AsyncIterator[tuple[Observer, str]]:
    """Observe the candidates of `side`, and serve them over HTTP; yields the observer and the URL."""
    observer = Observer(side.redis, KEYS, SPEC, folder)
    observer.begin(History(side.ledger, side.population))
    looking = asyncio.create_task(observer.run())
    try:
        async with served(observer, settings=HttpSettings(port=0)) as ask:
            yield observer, ask.url
    finally:
        looking.cancel()


async def rate(side: Side, count: int, seconds: float) -> dict[str, float]:
    """Return the outcomes per second, one candidate at a time, with `count` clients."""
    with tempfile.TemporaryDirectory() as folder, instant_workers(side.url, 1):
        async with observed(side, Path(folder)) as (_, url):
            await side.latencies(50)
            async with clients(url, count) if count else nullcontext():
                began, times = time.perf_counter(), list[float]()
                while time.perf_counter() - began < seconds:
                    times += await side.latencies(50)
                return {
                    "outcomes_per_second": len(times) / (time.perf_counter() - began),
                    "p99_ms": sorted(times)[int(0.99 * len(times))],
                }


async def delay(side: Side, count: int) -> dict[str, float]:
    """Return how long after an outcome a client reads its event, while `count` others listen, in seconds."""
    delays = []
    with tempfile.TemporaryDirectory() as folder, instant_workers(side.url, 1):
        async with (
            observed(side, Path(folder)) as (_, url),
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
            clients(url, count),
        ):
            reply = await session.get(f"{url}/api/events")
            for number in range(20):
                await side.latencies(1)
                done = time.perf_counter()
                while f'"{number:016x}"' not in (await reply.content.readline()).decode():
                    pass
                delays.append(time.perf_counter() - done)
                await asyncio.sleep(0.07)  # so that outcomes fall on all times between two looks
    return {"median": statistics.median(delays), "longest": max(delays)}


def main() -> None:
    """Measure on Valkey, or on Redis if there is no Valkey."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200, help=f"at most {MAX_EVENT_STREAMS - 1}")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.listen:
        asyncio.run(listen(arguments.listen, arguments.clients))
        return
    binary = server_binary("valkey") or server_binary("redis")
    if binary is None:
        raise SystemExit("there is neither a valkey-server nor a redis-server on this machine")
    ratios = []
    with temporary_server(binary) as server:
        for _ in range(arguments.repeats):
            without, with_clients = (
                asyncio.run(measure(server.url, lambda side, n=n: rate(side, n, arguments.seconds)))  # type: ignore[misc]
                for n in (0, arguments.clients)
            )
            ratios.append(with_clients["outcomes_per_second"] / without["outcomes_per_second"])
            print(json.dumps({"without": without, f"with {arguments.clients}": with_clients}), flush=True)
        late = asyncio.run(measure(server.url, lambda side: delay(side, arguments.clients)))
    print(f"{arguments.clients} clients: {statistics.median(ratios):.3f} of the outcomes per second without them")
    print(f"an event is read {late['median']:.2f} s after its outcome (median; longest {late['longest']:.2f} s)")


if __name__ == "__main__":
    main()
