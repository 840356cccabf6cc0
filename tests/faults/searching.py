"""A whole search of processes that may be killed, with a deterministic scripted LLM."""

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daemon.settings.sources import load
from protocol.queue.keys import Keys
from tests.faults.kit import PASSWORD, Kit, WorkerProcess, check_ends, strict_json
from tests.support.root import ROOT
from tests.support.samples import profile_for
from tests.support.schema_answers import value_of


def answer(body: dict[str, Any]) -> str:
    """Answer after a short delay, deterministically by question and seed."""
    time.sleep(0.02)
    schema = body["response_format"]["json_schema"]["schema"]
    return json.dumps(value_of(schema, random.Random(f"{body['seed']}{body['messages']}")))


class Search:
    """`selfpruner daemon` with a scripted LLM and fake workers, all of them processes that may be killed."""

    def __init__(
        self,
        kit: Kit,
        endpoints: Sequence[Mapping[str, str]],
        folder: Path,
        name: str = "faults",
        *,
        rounds: int = 3,
        llm: Mapping[str, object] | None = None,
    ) -> None:
        self.kit, self.folder = kit, folder
        self.keys = Keys(name)
        self.config = folder / "search.yaml"
        self.out = folder / "runs" / name
        self._llm = llm or {"reply": "edits"}
        self.write_config(rounds=rounds, endpoints=endpoints)
        kit.profile = profile_for(load(self.config, []).spec())
        self.logs: list[Path] = []

    def write_config(self, *, rounds: int, endpoints: Sequence[Mapping[str, str]]) -> None:
        sizes = {"population": 6, "mutations": 4, "crossovers": 3, "rounds": rounds}
        settings = {
            "search": {"name": self.keys.search, **sizes},
            "target": {"model": "tiny", "rate": 0.3},
            "data": {"calibration": "self", "fitness": "self", "seqlen": 32},
            "llm": {**self._llm, "endpoints": endpoints},
            "run": {"folder": str(self.folder / "runs")},
            "http": {"port": 0},
        }
        self.config.write_text(json.dumps(settings))  # JSON is YAML

    async def start(self, url: str = "") -> asyncio.subprocess.Process:
        """Start the daemon; `url` overrides the server of the kit."""
        log = self.folder / f"{self.keys.search}-{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("wb") as file:
            return await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "daemon",
                "daemon",
                str(self.config),
                cwd=ROOT,
                env={**os.environ, "SELFPRUNER_REDIS__URL": url or self.kit.server.url},
                stdout=file,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )

    async def begun(self, behaviour: str) -> tuple[asyncio.subprocess.Process, WorkerProcess]:
        """Start the daemon, and a worker each of whose evaluations does `behaviour`."""
        self.kit.write_script({"*": [behaviour]})
        return await self.start(), await self.kit.worker()

    async def applied(self) -> int:
        return int(await self.kit.redis.llen(self.keys.applied))

    async def has_applied(self, count: int, seconds: float = 90) -> None:
        """Wait until the daemon has applied that many outcomes."""
        async with asyncio.timeout(seconds):
            while await self.applied() < count:
                await asyncio.sleep(0.02)

    async def ends_well(self, daemon: asyncio.subprocess.Process, seconds: float = 120) -> None:
        """Wait for the daemon's end, and check it."""
        assert await asyncio.wait_for(daemon.wait(), seconds) == 0
        await self.check_end()

    async def history(self) -> dict[str, tuple[Any, ...]]:
        """Return the candidates of the search, independent of the order in which workers finished."""
        candidates = await self.kit.redis.hgetall(self.keys.candidates)
        outcomes = await self.kit.redis.hgetall(self.keys.outcomes)
        return {
            id_: (json.loads(text)["provenance"], json.loads(outcomes[id_])["perplexity"])
            for id_, text in candidates.items()
        }

    async def check_end(self) -> None:
        """Check the invariants of a finished search, on the server and in its folder."""
        applied = await check_ends(self.kit.redis, self.keys)
        lines = (self.out / "evaluations.jsonl").read_text().splitlines()
        assert [strict_json(line)["id"] for line in lines] == applied, "I2: the folder's copy is the same"
        self._check_logs()

    def _check_logs(self) -> None:
        for log in self.logs:
            text = log.read_text()
            assert PASSWORD not in text
            for line in text.splitlines():
                strict_json(line)
