"""A real daemon whose LLM endpoint sends hostile bytes: it ends well, and every candidate has its outcome."""

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.kit import Kit, strict_json
from tests.faults.marks import fault, slow_fault
from tests.faults.searching import Search, answer
from tests.support.hostile_replies import KINDS, Hostile, as_json, completion, http
from tests.support.hostile_server import HostileServer

QUESTIONS_A_ROUND = 8
MB = 1024 * 1024


def answers_well(request: bytes) -> bytes:
    """Return a list of models, or a valid answer to a question."""
    if request.startswith(b"GET"):
        return http(as_json({"data": [{"id": "scripted"}]}))
    body = json.loads(request.split(b"\r\n\r\n", 1)[1])
    return http(completion(answer(body) if "response_format" in body else "yes"))


def each_once(kinds: Sequence[Hostile]) -> Callable[[bytes], Hostile | bytes]:
    """Answer one question with each of the kinds, and all later ones with valid answers."""
    left = list(kinds)
    return lambda request: left.pop() if left and request.startswith(b"POST") else answers_well(request)


class HostileSearch(Search):
    """A search that asks its endpoint again at once after any failure."""

    def __init__(self, kit: Kit, server: HostileServer, folder: Path, *, rounds: int, **llm: Any) -> None:
        asked = {"reply": "edits", "attempts": 1, "deadline_seconds": 1, "failures_to_open": 100_000, **llm}
        endpoint = {"base_url": server.base_url, "model": "scripted"}
        super().__init__(kit, [endpoint], folder, rounds=rounds, llm=asked)
        kit.keys = self.keys

    async def run(self, seconds: float = 250) -> list[dict[str, Any]]:
        """Run the daemon and a worker to the end; returns the daemon's log lines."""
        await self.kit.worker()
        daemon = await self.start()
        process, self.largest = psutil.Process(daemon.pid), 0
        async with asyncio.timeout(seconds):
            while daemon.returncode is None:
                with contextlib.suppress(psutil.NoSuchProcess):  # it ends at this moment
                    self.largest = max(self.largest, process.memory_info().rss)
                await asyncio.sleep(0.05)
        log = (self.out / "log.jsonl").read_text()
        assert daemon.returncode == 0, log[-3000:]
        await self.check_end()
        lines = [strict_json(line) for line in log.splitlines()]
        assert max(map(len, log.splitlines())) < 3000
        assert not [line for line in lines if line["level"] in ("error", "critical") or "exception" in line]
        return lines


def named(*beginnings: str) -> list[Hostile]:
    """Return the kinds whose names begin with one of `beginnings`, without those that reject all questions."""
    return [kind for kind in KINDS if kind.name.startswith(beginnings) and not kind.refuses]


def between(first: str, last: str) -> list[Hostile]:
    names = [kind.name for kind in KINDS]
    return KINDS[names.index(first) : names.index(last) + 1]


@slow_fault("41", "an LLM endpoint speaks no HTTP, or lies about it", "every kind, raw socket", "the search ends well")
async def test_a_search_outlives_every_breach_of_http(kit: Kit, tmp_path: Path) -> None:
    kinds = between("nothing, and closes", "a reply of 3 MB")
    async with HostileServer(each_once(kinds)) as server:
        search = HostileSearch(kit, server, tmp_path, rounds=1 + len(kinds) // QUESTIONS_A_ROUND)
        await search.run()
        assert len(server.served) > 0.8 * len(kinds)


@slow_fault("42", "a reply takes long to read", "every hostile text, megabytes", "no silence")
async def test_no_text_keeps_a_daemon_from_its_other_work(kit: Kit, tmp_path: Path) -> None:
    kinds = named("text: ", "charset", "an error with charset")
    async with HostileServer(each_once(kinds)) as server:
        search = HostileSearch(kit, server, tmp_path, rounds=2 + len(kinds) // QUESTIONS_A_ROUND, deadline_seconds=20)
        await search.run()
        assert len(server.served) > 0.8 * len(kinds)


@fault("43", "an LLM endpoint counts tokens that cannot be", "10^400, 10^30, 1e999, …", "the budget stays")
async def test_no_count_of_tokens_uses_up_a_budget(kit: Kit, tmp_path: Path) -> None:
    kinds = named("usage of")
    async with HostileServer(each_once(kinds)) as server:
        search = HostileSearch(kit, server, tmp_path, rounds=2, budget_tokens=1_000_000)
        lines = await search.run()
        assert len(server.served) > 0.8 * len(kinds)
    assert "budget" not in [line.get("degraded") for line in lines]


@fault("44", "an LLM endpoint names a date that cannot be", "Retry-After in the year 10^11", "it waits")
async def test_a_search_outlives_odd_dates(kit: Kit, tmp_path: Path) -> None:
    kinds = [kind for kind in named("retry") if "9999" in kind.name or "NaN" in kind.name or "list" in kind.name]
    async with HostileServer(each_once(kinds)) as server:
        search = HostileSearch(kit, server, tmp_path, rounds=2)
        await search.run()
        assert server.served


@pytest.mark.parametrize("seed", [1, 2])
@slow_fault("45", "an LLM endpoint sends anything", "all kinds at random, every other answer good", "ends well")
async def test_a_search_outlives_anything(kit: Kit, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    kinds = [kind for kind in KINDS if not kind.refuses and "retry" not in kind.name]
    async with HostileServer(
        lambda request: rng.choice(kinds) if rng.random() < 0.5 else answers_well(request), rng
    ) as server:
        search = HostileSearch(kit, server, tmp_path, rounds=30)
        lines = await search.run()
        assert sum(server.served.values()) > 60
    assert search.largest < 500 * MB
    sources = [line.get("source") for line in lines if line["event"] == "candidate_enqueued"]
    assert {"llm", "fallback"} <= set(sources)
