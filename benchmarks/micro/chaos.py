"""A search whose daemon and workers are killed at random has the history of an undisturbed one.

    python -m benchmarks.micro.chaos [--minutes 5] [--seed 0]

Runs `selfpruner daemon`, three workers with a fake evaluator, a deterministic scripted LLM and a real server: first
undisturbed, then with `kill -9` every few seconds until the time is over. Exit code 1 if the two histories (every
candidate with its provenance and perplexity) differ, or if the search ended too early.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.kit import PASSWORD, Kit, WorkerProcess, fault_kit
from tests.faults.searching import Search, answer
from tests.support.scripted_llm import ScriptedLlm
from tests.support.servers import Server, server_binary, temporary_server

WORKERS = 3
SECONDS_BETWEEN_KILLS = (2.0, 8.0)
ROUNDS_PER_MINUTE = 40
"""Rounds of the search for each minute of chaos. A search that is killed so often completes fewer rounds."""


class Chaos:
    """One search with its daemon and its workers, which are restarted after a kill."""

    def __init__(self, kit: Kit, search: Search, seed: int) -> None:
        self.kit, self.search = kit, search
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.workers: list[WorkerProcess] = []
        self.is_over_early = False
        """Whether the search ended before the time was over."""

    async def run(self, seconds: float) -> None:
        """Run the search to its end, killing processes during the first `seconds`."""
        self.daemon = await self.search.start()
        self.workers = [await self.kit.worker(lease_seconds=3) for _ in range(WORKERS)]
        until = time.monotonic() + seconds
        while self.daemon.returncode != 0:
            await asyncio.sleep(self.random.uniform(*SECONDS_BETWEEN_KILLS) if seconds else 0.5)
            if time.monotonic() < until:
                await self._kill_one()
            if self.daemon.returncode not in (None, 0):
                self.daemon = await self.search.start()
        self.is_over_early = time.monotonic() < until
        for worker in self.workers:
            await worker.kill()

    async def _kill_one(self) -> None:
        victim = self.random.randrange(WORKERS + 1)
        if victim < WORKERS:
            await self.workers[victim].kill()
            self.workers[victim] = await self.kit.worker(lease_seconds=3)
        elif self.daemon.returncode is None:
            self.daemon.kill()
            await self.daemon.wait()
        self.kills["worker" if victim < WORKERS else "daemon"] += 1


async def chaos(arguments: argparse.Namespace, server: Server, folder: Path) -> dict[str, Any]:
    """Return candidates, kills, evaluations, and how many entries of the two histories differ."""
    async with ScriptedLlm(answer) as llm, fault_kit(server, folder) as kit:
        kit.unsettled = True  # the kit's own daemon is not used, because this daemon is a process
        kit.disturbed["*"] = 1000
        histories, kills = [], Counter[str]()
        for name, seconds in (("calm", 0.0), ("chaos", 60 * arguments.minutes)):
            rounds = max(2, round(ROUNDS_PER_MINUTE * arguments.minutes))
            search = Search(kit, [llm.settings], folder, name, rounds=rounds)
            kit.keys = search.keys
            kit.write_script({"*": ["sleep:0.3"]})  # with the profile of this search
            one = Chaos(kit, search, arguments.seed)
            began = time.monotonic()
            await one.run(seconds)
            print(f"{name:6} {await search.applied()} outcomes in {time.monotonic() - began:.0f} s, {dict(one.kills)}")
            histories.append(await search.history())
            kills += one.kills
            await search.check_end()
        calm, chaotic = histories
        if one.is_over_early:
            print(f"the disturbed search ended before {arguments.minutes:g} minutes were over", file=sys.stderr)
        return {
            "candidates": len(calm),
            "kills": dict(kills),
            "evaluations": kit.evaluations.total() - len(calm),
            "differences": sum(calm.get(id_) != chaotic.get(id_) for id_ in {*calm, *chaotic}),
            "over_early": one.is_over_early,
        }


def main() -> None:
    """Run both searches and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    binary = server_binary("valkey")
    assert binary is not None
    with tempfile.TemporaryDirectory(prefix="sp-") as folder, temporary_server(binary, password=PASSWORD) as server:
        figures = asyncio.run(chaos(arguments, server, Path(folder)))
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    sys.exit(bool(figures["differences"]) or figures["over_early"])


if __name__ == "__main__":
    main()
