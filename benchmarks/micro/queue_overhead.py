"""Overhead of the queue: latency from enqueue to applied outcome, and throughput of many workers.

    python -m benchmarks.micro.queue_overhead [--workers 64] [--candidates 20000]

Only the evaluation is fake, and instant. The server (append-only file, unix socket), the daemon's queue and keeper, and
the worker processes are real. Prints a table, and writes JSON with --json FILE.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agents.population.keeper import PopulationKeeper
from agents.population.population import Population
from protocol.plans.candidate import Candidate
from protocol.queue.connection import connect
from protocol.queue.control import Control
from protocol.queue.jobs import JobQueue
from protocol.queue.keys import Keys
from protocol.queue.streams import CandidateQueue
from protocol.queue.worker_status import WorkerStatus, read_workers
from tests.support.samples import SPEC, candidate, measured
from tests.support.servers import server_binary, temporary_server

LIMIT_MS = 5.0
KEYS = Keys("benchmark")


async def work(url: str, name: str, search: str) -> None:
    """Run an instant worker."""
    redis = connect(url)
    jobs = JobQueue(redis, Keys(search), name, lease_seconds=30)
    outcome = measured(10.0)

    async def beat() -> None:
        while True:
            await jobs.beat(None, WorkerStatus(stage="idle").to_json())
            await asyncio.sleep(10)

    beating = asyncio.create_task(beat())
    control = Control(redis, Keys(search))
    while await control.read() != "run":  # noqa: ASYNC110  (it is set by another process)
        await asyncio.sleep(0.05)
    while not beating.done():
        if job := await jobs.claim():
            await jobs.commit(job, outcome)


@contextmanager
def instant_workers(url: str, count: int, search: str = KEYS.search) -> Iterator[None]:
    """Start `count` instant workers as processes."""
    command = [sys.executable, "-m", "benchmarks.micro.queue_overhead", "--worker", url, "--search", search]
    processes = [subprocess.Popen([*command, "--name", f"w{i}"], cwd=Path(__file__).parents[2]) for i in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


class Side:
    """The daemon's side: queue, keeper and population."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.redis = connect(url)
        self.queue = CandidateQueue(self.redis, KEYS, epoch=1, fingerprint=SPEC.fingerprint)
        self.ledger: dict[str, Candidate] = {}
        self.population = Population()
        self.keeper = PopulationKeeper(self.queue, self.population, self.ledger, on_evaluation=lambda *_: None)

    async def send(self, number: int) -> None:
        """Enqueue one more candidate; all have the same plan and different ids."""
        one = candidate((0.3,) * 4).model_copy(update={"id": f"{number:016x}"})
        self.ledger[one.id] = one
        await self.queue.enqueue(one)

    async def latencies(self, count: int) -> list[float]:
        """Return the milliseconds from enqueue to applied outcome, one candidate at a time."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            await self.send(len(self.ledger))
            await self.keeper.settled()
            times.append((time.perf_counter() - began) * 1000)
        return times

    async def fill(self, count: int) -> None:
        """Enqueue `count` candidates, twenty at a time."""
        for start in range(len(self.ledger), len(self.ledger) + count, 20):
            await asyncio.gather(*(self.send(number) for number in range(start, start + 20)))


async def measure(url: str, function: Callable[[Side], Awaitable[dict[str, float]]]) -> dict[str, float]:
    """Run `function` while a keeper runs, on an empty server."""
    side = Side(url)
    await side.redis.flushall()
    await side.redis.set(KEYS.epoch, 1)
    keeping = asyncio.create_task(side.keeper.run())
    try:
        return await function(side)
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await side.redis.aclose()


def latency(url: str, count: int) -> dict[str, float]:
    """Measure the latency with one instant worker, one candidate at a time."""

    async def run(side: Side) -> dict[str, float]:
        with instant_workers(url, 1):
            await side.latencies(20)
            times = await side.latencies(count)
        return {"median_ms": statistics.median(times), "p99_ms": sorted(times)[int(0.99 * count)]}

    return asyncio.run(measure(url, run))


def throughput(url: str, workers: int, count: int) -> dict[str, float]:
    """Measure the outcomes per second of many instant workers that all start at once with a full queue."""

    async def run(side: Side) -> dict[str, float]:
        control = Control(side.redis, KEYS)
        await control.write("pause")
        await side.fill(count)
        with instant_workers(url, workers):
            while await alive(side) < workers:  # noqa: ASYNC110  (it happens in other processes)
                await asyncio.sleep(0.5)
            await control.write("run")
            began = time.perf_counter()
            await side.keeper.settled()
            return {"outcomes_per_second": count / (time.perf_counter() - began)}

    return asyncio.run(measure(url, run))


async def alive(side: Side) -> int:
    """Return the number of workers with a heartbeat."""
    return len((await read_workers(side.redis, KEYS)).workers)


def main() -> None:
    """Measure on each server installed on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    for hidden in ("--worker", "--name", "--search"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        asyncio.run(work(arguments.worker, arguments.name, arguments.search))
        return
    figures = {}
    for kind in ("valkey", "redis"):
        if (binary := server_binary(kind)) is None:
            continue
        with temporary_server(binary) as server:
            row = latency(server.url, 1000)
            row |= throughput(server.url, arguments.workers, arguments.candidates)
        figures[kind] = row
        print(
            f"{kind:8} enqueue to outcome {row['median_ms']:.2f} ms median, {row['p99_ms']:.2f} ms p99 "
            f"(limit {LIMIT_MS:g}); {arguments.workers} workers: {row['outcomes_per_second']:.0f} outcomes/s"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    sys.exit(any(row["median_ms"] > LIMIT_MS for row in figures.values()))


if __name__ == "__main__":
    main()
