"""A search with hostile LLM endpoints and random Redis errors ends with the population of an undisturbed one.

    python -m benchmarks.micro.hostile_llm [--minutes 5] [--seed 0]

Runs `selfpruner daemon`, two workers with a fake evaluator and a real server. For the given minutes every reply of the
LLM endpoints is a random one of tests/support/hostile_replies.py: invalid HTTP, endless headers, impossible numbers,
megabytes of tags. Meanwhile a proxy answers some Redis commands with errors, and unreadable entries are written to the
streams and the control key. The daemon is restarted now and then, because some endpoints ask it to wait for hours. Then
the disturbances stop, the last round is completed, and the search is compared with one that ran undisturbed without an
LLM.

Exit code 1 if a candidate, its provenance or its perplexity differs; if the daemon or a worker ended by itself; if the
daemon's event loop was blocked for more than half a second; or if a file contains a secret.
"""

import argparse
import asyncio
import base64
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from daemon.http_api.token import TOKEN_FILE
from tests.faults.kit import PASSWORD, Kit, WorkerProcess, fault_kit
from tests.faults.proxy import Proxy
from tests.faults.searching import Search
from tests.support.hostile_replies import KINDS, Hostile
from tests.support.hostile_server import HostileServer
from tests.support.servers import Server, server_binary, temporary_server

NOWHERE = {"base_url": "http://127.0.0.1:9/v1", "model": "model", "name": "nowhere"}
KEY = "sk-hostile-8d1f+/5309="
ENDPOINTS = 4
WORKERS = 2
SHIFT_SECONDS = 45.0
"""How long one daemon runs before it is restarted."""
LONG_WAITS_AFTER = 0.8
"""After this share of a daemon's run, endpoints may also ask it to wait for hours."""
LONGEST_BLOCK = 0.5
"""Maximum number of seconds for which the event loop may be blocked."""
TROUBLE_SECONDS = (0.5, 3.0)
UNDECODABLE = b"\xff\xfe\x00"
ANSWERS = ("text: 20,000 profiles", "text: the same key 20,000 times")
"""Kinds of replies with a usable proposal. They are left out, because they would change the population."""
REDIS_ERRORS: tuple[tuple[str | bytes, tuple[str, ...]], ...] = (
    ("-BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", ()),
    ("-LOADING Redis is loading the dataset in memory", ()),
    (
        "-UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
        ("XREADGROUP", "XREAD"),
    ),
    ("-TRYAGAIN Multiple keys request during rehashing of slot", ()),
    ("-CLUSTERDOWN The cluster is down", ()),
    ("-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", ()),
    ("-READONLY You can't write against a read only replica.", ()),
    ("-MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.", ()),
    ("-OOM command not allowed when used memory > 'maxmemory'.", ()),
    ("-NOSCRIPT No matching script. Please use EVAL.", ("EVALSHA",)),
    (b"\x00\xffthis is no Redis\r\n", ()),
)


@dataclass
class Figures:
    """The figures of one run."""

    replies: Counter[str] = field(default_factory=Counter)
    redis_errors: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    daemons: int = 0
    longest_block: float = 0.0
    longest_busy_block: float = 0.0
    problems: list[str] = field(default_factory=list)


class Replies:
    """Chooses the replies of endpoints. Every kind is served once, in random order, before any kind is repeated."""

    def __init__(self, rng: random.Random) -> None:
        self.served: Counter[str] = Counter()
        self.has_begun = False
        """Whether the search has begun. Before that, an endpoint that rejects the key makes the daemon's start fail."""
        self.may_ask_for_long_waits = False
        """Whether endpoints may ask the daemon to wait for hours."""
        self._random = rng
        self._any = [kind for kind in KINDS if kind.name not in ANSWERS]

    def __call__(self, _request: bytes) -> Hostile:
        """Return the next kind."""
        kinds = [kind for kind in self._any if self._may_serve(kind)]
        fewest = min(self.served[kind.name] for kind in kinds)
        kind = self._random.choice([kind for kind in kinds if self.served[kind.name] == fewest])
        self.served[kind.name] += 1
        return kind

    def _may_serve(self, kind: Hostile) -> bool:
        if kind.name.startswith("retry"):
            return self.may_ask_for_long_waits
        return self.has_begun or not kind.refuses


class Disturbed:
    """The disturbed search: its daemon, its workers, and the disturbances."""

    def __init__(self, search: Search, proxy: Proxy, replies: Replies, figures: Figures, rng: random.Random) -> None:
        self.kit, self.search, self.proxy = search.kit, search, proxy
        self.replies, self.figures, self.random = replies, figures, rng
        self.workers: list[WorkerProcess] = []

    async def run(self, seconds: float) -> None:
        """Disturb the search for `seconds`."""
        self.workers = [await self.kit.worker(url=self.proxy.url(PASSWORD), lease_seconds=5) for _ in range(WORKERS)]
        until = time.monotonic() + seconds
        troubles = asyncio.create_task(self._troubles())
        while (left := until - time.monotonic()) > 0:
            await self._shift(min(SHIFT_SECONDS, left))
            kinds, outcomes = len(self.replies.served), await self.search.applied()
            print(f"{kinds} kinds of replies, {outcomes} outcomes, longest block {self.figures.longest_block:.2f} s")
        troubles.cancel()
        await asyncio.wait({troubles})
        self.proxy.refusals.clear()
        self.figures.redis_errors += self.proxy.refused
        self.figures.replies += self.replies.served
        for worker in self.workers:
            if worker.process.returncode is not None:
                self.figures.problems.append(f"a worker ended with {worker.process.returncode}: {worker.log}")

    async def _shift(self, seconds: float) -> None:
        """Run one daemon from its start to its end."""
        daemon = await self.search.start(self.proxy.url(PASSWORD))
        self.figures.daemons += 1
        self.replies.may_ask_for_long_waits = False
        began = time.monotonic()
        while time.monotonic() - began < seconds and daemon.returncode is None:
            await asyncio.sleep(1)
            self.replies.may_ask_for_long_waits = time.monotonic() - began > LONG_WAITS_AFTER * seconds
            self.replies.has_begun = self.replies.has_begun or await self.search.applied() > 0
            await self._read_heartbeat()
        if daemon.returncode is not None:
            self.figures.problems.append(f"the daemon ended with {daemon.returncode}: {self.search.logs[-1]}")
            return
        daemon.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(daemon.wait(), 20)
        except TimeoutError:
            self.figures.problems.append(f"the daemon did not end when told to: {self.search.logs[-1]}")
            daemon.kill()
            await daemon.wait()

    async def _read_heartbeat(self) -> None:
        url = api_url(self.search.logs[-1])
        if url is None:
            return
        token = (self.search.folder / "runs" / self.search.keys.search / TOKEN_FILE).read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics", headers=headers) as response:
                page = await response.text()
        except aiohttp.ClientError:
            return  # the daemon is ending, which is noticed elsewhere
        values = {s.name: s.value for family in text_string_to_metric_families(page) for s in family.samples}
        prefix = "selfpruner_event_loop_longest"
        self.figures.longest_block = max(self.figures.longest_block, values[f"{prefix}_block_seconds"])
        self.figures.longest_busy_block = max(self.figures.longest_busy_block, values[f"{prefix}_busy_block_seconds"])

    async def _troubles(self) -> None:
        """Alternate between phases with and without Redis errors, and write unreadable entries."""
        redis, keys = self.kit.redis, self.search.keys
        while True:
            error, commands = self.random.choice(REDIS_ERRORS)
            self.proxy.refuse(error, share=self.random.choice((0.05, 0.5)), commands=commands)
            await asyncio.sleep(self.random.uniform(*TROUBLE_SECONDS))
            self.proxy.refusals.clear()
            for stream in (keys.jobs, keys.results):
                await redis.xadd(stream, {b"id": UNDECODABLE, UNDECODABLE: b"{}"})
            await redis.set(keys.control, UNDECODABLE)
            self.figures.unreadable += 3
            await asyncio.sleep(self.random.uniform(*TROUBLE_SECONDS))


def api_url(log: Path) -> str | None:
    """Return the URL of the API of the daemon with this log; None before it listens."""
    for line in log.read_text().splitlines():
        if '"http_api_listening"' in line:
            return str(json.loads(line)["url"])
    return None


def hostile_endpoints(base_url: str) -> list[dict[str, str]]:
    """Return several endpoints with the same URL."""
    return [{"base_url": base_url, "model": "model", "api_key": KEY, "name": f"llm-{i}"} for i in range(ENDPOINTS)]


def make_search(kit: Kit, folder: Path, name: str, endpoints: list[dict[str, str]]) -> Search:
    """Return a search with the reply form `moves`, which reaches most parsers of replies."""
    llm = {"reply": "moves", "deadline_seconds": 2, "start_wait_seconds": 1, "rest_seconds": 0.05, "reasks": 1}
    return Search(kit, endpoints, folder, name, rounds=1_000_000, llm=llm)


async def hostile(minutes: float, seed: int, server: Server, folder: Path) -> Figures:
    """Run both searches and compare them."""
    figures = Figures()
    async with fault_kit(server, folder) as kit, Proxy(server.socket, seed=seed) as proxy:
        kit.unsettled = True  # the kit's own daemon is not used, because this daemon is a process
        kit.disturbed["*"] = 1000
        rng = random.Random(seed)
        replies = Replies(rng)
        async with HostileServer(replies, rng) as llm:
            search = make_search(kit, folder, "hostile", hostile_endpoints(llm.base_url))
            kit.keys = search.keys
            kit.write_script({"*": ["sleep:0.05"]})
            disturbed = Disturbed(search, proxy, replies, figures, rng)
            await disturbed.run(60 * minutes)
        await kit.redis.delete(search.keys.control)
        rounds = await last_round(kit, search)
        figures.problems += await complete(search, rounds)
        history = await search.history()
        for worker in disturbed.workers:
            await worker.kill()
        calm = make_search(kit, folder, "calm", [NOWHERE])
        kit.keys = calm.keys
        kit.write_script({"*": ["instant"]})
        kit.workers += [await kit.worker()]
        figures.problems += await complete(calm, rounds)
        figures.problems += differences(history, await calm.history())
        await kit.workers[-1].kill()
    figures.problems += secrets_in(folder)
    if figures.longest_block > LONGEST_BLOCK:
        figures.problems.append(f"the event loop was blocked for {figures.longest_block:.2f} s")
    return figures


async def last_round(kit: Kit, search: Search) -> int:
    """Return the round that the search has reached."""
    ledger = await kit.redis.hvals(search.keys.candidates)
    return max((json.loads(candidate)["provenance"]["round"] for candidate in ledger), default=0)


async def complete(search: Search, rounds: int) -> list[str]:
    """Run the search up to round `rounds`, undisturbed and without an LLM. Returns the problems found at its end."""
    search.write_config(rounds=max(1, rounds), endpoints=[NOWHERE])
    daemon = await search.start()
    status = await asyncio.wait_for(daemon.wait(), 600)
    await delete_unreadable(search)
    try:
        await search.check_end()
    except AssertionError as error:
        return [f"{search.keys.search}: {error}"]
    return [f"{search.keys.search} ended with {status}: {search.logs[-1]}"] if status else []


async def delete_unreadable(search: Search) -> None:
    """Delete our unreadable entries from the streams. Those written at the search's end have not been read."""
    for stream in (search.keys.jobs, search.keys.results):
        for id_, fields in await search.kit.redis.xrange(stream):
            if UNDECODABLE.decode(errors="replace") in fields:
                await search.kit.redis.xdel(stream, id_)


def differences(hostile: dict[str, tuple[Any, ...]], calm: dict[str, tuple[Any, ...]]) -> list[str]:
    """Compare the two histories. Returns a sentence if they differ."""
    differing = sum(hostile.get(id_) != calm.get(id_) for id_ in {*hostile, *calm})
    print(f"{len(hostile)} candidates, {len(calm)} in the undisturbed search, {differing} differ")
    return [f"{differing} of {len(calm)} candidates differ"] if differing or not calm else []


def secrets_in(folder: Path) -> list[str]:
    """Return a sentence for each file that contains a secret in any form."""
    forms = {form for secret in (KEY, PASSWORD) for form in (secret, quote(secret, safe=""), encoded(secret))}
    return [
        f"{path.name} holds a secret"
        for path in folder.rglob("*")
        if path.is_file() and path.name != "search.yaml" and any(form.encode() in path.read_bytes() for form in forms)
    ]


def encoded(secret: str) -> str:
    """Return the secret in base64, without its last characters, which depend on the text after the secret."""
    return base64.b64encode(secret.encode()).decode().rstrip("=")[:-1]


def main() -> None:
    """Run both searches and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder in which logs and files are kept")
    arguments = parser.parse_args()
    binary = server_binary("valkey")
    assert binary is not None
    with tempfile.TemporaryDirectory(prefix="sp-") as folder, temporary_server(binary, password=PASSWORD) as server:
        # A subfolder, because the kit reports processes whose command line names its folder, and ours may name --keep.
        where = (arguments.keep or Path(folder)) / "searches"
        where.mkdir(parents=True)
        figures = asyncio.run(hostile(arguments.minutes, arguments.seed, server, where))
    report = {
        "kinds_of_replies": len(figures.replies),
        "replies": figures.replies.total(),
        "redis_errors": figures.redis_errors.total(),
        "unreadable_entries": figures.unreadable,
        "daemons": figures.daemons,
        "longest_block_seconds": round(figures.longest_block, 3),
        "longest_busy_block_seconds": round(figures.longest_busy_block, 3),
        "problems": figures.problems,
    }
    print(json.dumps(report, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    sys.exit(bool(figures.problems))


if __name__ == "__main__":
    main()
