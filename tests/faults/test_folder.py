"""A real daemon or run while its folder is deleted or damaged, or while it receives invalid HTTP."""

import asyncio
import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from daemon.local.valkey import embedded_url
from protocol.queue.connection import connect
from protocol.queue.control import Control
from protocol.queue.keys import Keys
from tests.end_to_end.test_run import CANDIDATES, Run
from tests.end_to_end.test_run import llm as a_scripted_llm  # noqa: F401  (a fixture)
from tests.faults.marks import slow_fault
from tests.faults.searching import Search
from tests.support.malformed_http import CORPUS, mutated
from tests.support.scripted_llm import ScriptedLlm
from tests.support.servers import eventually

TOTAL = 1 + 6 + 3 * (4 + 3)
FILES = ("spec.json", "profile.json", "best.json", "evaluations.jsonl", "transcript.jsonl", "status.json", "http-token")


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(folder: Path) -> list[str]:
    return [record["event"] for record in records(folder / "log.jsonl")]


@slow_fault("57", "the folder of a search is removed", "rm -rf in mid-run, three times", "written anew, whole")
async def test_a_daemon_whose_folder_is_removed_writes_it_anew(search: Search, llm: ScriptedLlm) -> None:
    folder = search.out
    daemon, _ = await search.begun("sleep:0.2")
    for number in range(3):
        await search.has_applied(3 + 5 * number)
        await eventually(lambda: all((folder / name).exists() for name in FILES))
        shutil.rmtree(folder, ignore_errors=True)  # the daemon writes meanwhile
    await search.ends_well(daemon)
    assert await search.applied() == TOTAL
    assert all((folder / name).exists() for name in (*FILES, "summary.json"))
    assert len(records(folder / "transcript.jsonl")) == len(llm.asked)
    assert events(folder).count("folder_changed") >= 3 and "folder_incomplete" not in events(folder)


@slow_fault("59", "the last line of a file is torn", "7 bytes cut off, in mid-run", "the next record is whole")
async def test_a_torn_line_swallows_no_record(search: Search, llm: ScriptedLlm) -> None:
    folder = search.out
    daemon, _ = await search.begun("sleep:0.1")
    await search.has_applied(8)
    for name in ("evaluations.jsonl", "transcript.jsonl"):
        os.truncate(folder / name, (folder / name).stat().st_size - 7)
    await search.ends_well(daemon)
    whole, torn = 0, 0
    for line in (folder / "transcript.jsonl").read_text().splitlines():
        try:
            json.loads(line)
            whole += 1
        except ValueError:
            torn += 1
    assert (whole, torn) == (len(llm.asked) - 1, 1)


@slow_fault("61", "requests that are not valid HTTP", "a corpus and 1000 mutations", "few short lines")
async def test_malformed_requests_do_not_reach_the_search(search: Search) -> None:
    folder = search.out
    daemon, _ = await search.begun("sleep:0.2")
    await eventually(lambda: "http_api_listening" in events(folder), 60)
    (url,) = (record["url"] for record in records(folder / "log.jsonl") if record["event"] == "http_api_listening")
    port = int(url.rpartition(":")[2])
    for request in [*CORPUS.values(), *mutated(61, 1000)]:
        await sent(port, request)
        if daemon.returncode is not None:
            break
    await search.ends_well(daemon)
    text = (folder / "log.jsonl").read_text()
    told = [line for line in text.splitlines() if "http_" in line]
    assert "Traceback" not in text and "http_request_failed" not in text
    assert 2 <= len(told) <= 30 and max(map(len, told)) < 300


async def sent(port: int, request: bytes) -> None:
    """Send the bytes and return the immediate answer."""
    with contextlib.suppress(ConnectionError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reader.read(100), 0.02)
        writer.close()


@pytest.fixture
def run(tmp_path: Path, target: Path, a_scripted_llm: ScriptedLlm) -> Run:  # noqa: F811
    return Run(tmp_path, target, a_scripted_llm)


@slow_fault("58", "the folder goes with the embedded server's files", "rm -rf in mid-run", "all restored")
async def test_a_run_whose_folder_is_removed_with_its_servers_files_goes_on(run: Run) -> None:
    folder = run.folder / "runs" / "s"
    process = await run.start("search.rounds=8")
    await eventually(lambda: run.measured(4), 120)
    async with connect(embedded_url(folder)) as redis:
        await Control(redis, Keys("s")).write("pause")
    measured = len(run.evaluations())
    shutil.rmtree(folder, ignore_errors=True)  # the daemon writes meanwhile
    await eventually(lambda: "redis_lost_data" in events(folder) and len(run.evaluations()) >= measured, 60)
    async with connect(embedded_url(folder)) as redis:  # by the socket, which is there again
        await Control(redis, Keys("s")).write("run")
    out_bytes, err_bytes = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, err_bytes.decode()[-2000:]
    assert json.loads(out_bytes)["finished"]
    assert len({record["id"] for record in run.evaluations()}) == len(run.evaluations()) >= CANDIDATES
    assert "server_files_removed" in events(folder)
    assert (folder / "valkey" / "appendonlydir").exists()


@slow_fault("60", "a removed folder is taken by a second run", "rm -rf, then run at once", "one ends, and says why")
async def test_one_of_two_runs_in_a_removed_folder_ends_with_a_sentence(run: Run) -> None:
    folder = run.folder / "runs" / "s"
    first = await run.start()
    await eventually(lambda: run.measured(2), 120)
    shutil.rmtree(folder, ignore_errors=True)  # the daemon writes meanwhile
    second = await run.start()
    (_, err_1), (_, err_2) = await asyncio.wait_for(asyncio.gather(first.communicate(), second.communicate()), 240)
    codes = {first.returncode: err_1.decode(), second.returncode: err_2.decode()}
    assert set(codes) == {0, 2}, [text[-1500:] for text in codes.values()]
    last = codes[2].splitlines()[-1]
    assert last.startswith("selfpruner: ") and (
        "another run of the search uses it" in last or "already running" in last
    )
    assert len({record["id"] for record in run.evaluations()}) == len(run.evaluations()) >= CANDIDATES
