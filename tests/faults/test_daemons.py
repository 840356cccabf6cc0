"""Faults of the daemon: of its keeper, of a whole search, and of the files that it writes."""

import asyncio
import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from protocol.queue.control import Control
from tests.faults.kit import Kit, eventually
from tests.faults.marks import slow_fault
from tests.faults.searching import Search
from tests.support.root import ROOT
from tests.support.scripted_llm import ScriptedLlm

LIVES = 200
CANDIDATES = 500


@pytest.mark.timeout(900)
@slow_fault("29", "the keeper dies between two steps", "SIGKILL, 200 lives, 500 candidates", "each applied once")
async def test_a_keeper_that_dies_again_and_again_applies_every_outcome_once(kit: Kit) -> None:
    await kit.worker()
    draw = random.Random(29)
    bests: list[float] = []
    lives, epochs = 0, [0]
    while True:
        steps = draw.randint(2, 10) if lives < LIVES else 0
        keeper = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.faults.keeper_process",
            str(CANDIDATES),
            str(steps),
            cwd=ROOT,
            env={**os.environ, "SELFPRUNER_REDIS__URL": kit.server.url},
        )
        code = await asyncio.wait_for(keeper.wait(), 120)
        lives += 1
        outcomes = await kit.redis.hvals(kit.keys.outcomes)
        epochs.append(int(await kit.redis.get(kit.keys.epoch) or 0))
        bests.append(min((json.loads(text)["perplexity"] for text in outcomes), default=float("inf")))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert lives >= 100
    assert bests == sorted(bests, reverse=True), "the best never worsens"
    daemon = await kit.daemon()
    assert daemon.population.outcomes == len(daemon.ledger) == CANDIDATES
    assert epochs == sorted(set(epochs)), "each life has a higher epoch than the one before"


TOTAL = 1 + 6 + 3 * (4 + 3)


@slow_fault("12+29", "the daemon and workers are killed in mid-round", "SIGKILL, 5 times", "the undisturbed history")
async def test_a_search_that_is_killed_again_and_again_has_the_history_of_an_undisturbed_one(
    kit: Kit, llm: ScriptedLlm, tmp_path: Path
) -> None:
    calm = Search(kit, [llm.settings], tmp_path, "calm")
    kit.keys = calm.keys
    kit.write_script({"*": ["sleep:0.05"]})
    worker = await kit.worker()
    daemon = await calm.start()
    assert await asyncio.wait_for(daemon.wait(), 60) == 0
    await worker.kill()
    asked = len(llm.asked)
    kit.evaluations.clear()
    (tmp_path / "evaluated.log").unlink()

    search = Search(kit, [llm.settings], tmp_path, "faults")
    kit.keys = search.keys
    draw = random.Random(12)
    deaths = 0
    while True:
        daemon = await search.start()
        worker = await kit.worker()
        wanted = await search.applied() + draw.randint(2, 6)
        try:
            async with asyncio.timeout(60):
                while daemon.returncode is None and (deaths == 5 or await search.applied() < wanted):
                    await asyncio.sleep(0.01)
        finally:
            if daemon.returncode is None:
                daemon.kill()
        await daemon.wait()
        if daemon.returncode == 0:
            break
        await worker.kill()
        deaths += 1
    assert deaths == 5
    kit.disturbed["*"] = deaths
    mine, theirs = await search.history(), await calm.history()
    assert len(mine) == TOTAL
    assert mine == theirs
    selections = [a.body for a in llm.asked[asked:] if a.body["response_format"]["json_schema"]["name"] == "selector"]
    assert len(selections) <= 3 + 2  # asked again only where the answer had not been stored yet
    await search.check_end()


@slow_fault("31", "killed while paused", "pause, SIGKILL all, restart, resume", "stays paused, then goes on")
async def test_a_pause_outlives_a_kill_of_all(kit: Kit, llm: ScriptedLlm, search: Search) -> None:
    daemon, worker = await search.begun("sleep:0.1")
    await search.has_applied(4)
    await Control(kit.redis, search.keys).write("pause")
    await asyncio.sleep(2)
    asked, evaluated = len(llm.asked), kit.evaluations.total()
    daemon.kill()
    await daemon.wait()
    await worker.kill()
    kit.server.kill()
    kit.server.start()
    daemon = await search.start()
    await kit.worker()
    await asyncio.sleep(8)
    assert daemon.returncode is None
    assert (len(llm.asked), kit.evaluations.total()) == (asked, evaluated)
    await Control(kit.redis, search.keys).write("run")
    assert await asyncio.wait_for(daemon.wait(), 60) == 0
    assert await search.applied() == TOTAL
    kit.disturbed["*"] = 1
    await search.check_end()


@slow_fault("32", "killed while writing a file", "SIGKILL, 40 times, at random", "best.json is whole")
async def test_a_file_that_is_being_written_when_its_writer_is_killed_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    code = (
        "import json, pathlib, sys\nfrom protocol.runtime.files import write_atomically as write\n"
        "for n in range(10**9): write(pathlib.Path(sys.argv[1]), json.dumps({'n': n, 'filler': 'x' * 200_000}))"
    )
    draw = random.Random(32)
    for _ in range(40):
        writer = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(path), cwd=ROOT)
        await eventually(path.exists)
        await asyncio.sleep(draw.uniform(0, 0.05))
        writer.kill()
        await writer.wait()
        assert len(json.loads(path.read_text())["filler"]) == 200_000
        path.unlink()
