"""A folder whose disk is full, or never answers: the search goes on, says so once, and writes what is owed later."""

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from daemon.launch.launch import Launch
from daemon.settings.settings import Settings
from daemon.state import transcript
from daemon.state.folder_errors import FolderErrors
from daemon.state.transcript import TranscriptFile
from protocol.queue.keys import Keys
from protocol.runtime.files import AppendOnlyFile, write_atomically
from tests.daemon.launch.test_launch import settings_for as launch_settings
from tests.daemon.launch.test_launch import worker_there
from tests.support.disks import Disk, LimitedFiles, SmallDisk, full_at, mounted
from tests.support.schema_answers import answer
from tests.support.scripted_llm import ScriptedLlm
from tests.support.servers import Server

pytestmark = pytest.mark.one_server

CANDIDATES = 4 + 4 * 3
TOLD = ("folder_not_written", "folder_written_again", "folder_incomplete", "transcript_lines_missing")


@pytest.fixture(params=[SmallDisk, LimitedFiles])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with mounted(request.param(tmp_path / "disk")) as disk:
        if disk is None:
            pytest.skip("only root may make a small disk (mount -t tmpfs)")
        yield disk


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[LimitedFiles]:
    disk = LimitedFiles(tmp_path / "disk")
    with mounted(disk):
        yield disk


def settings_for(folder: Path, llm: ScriptedLlm) -> Settings:
    """A search that asks for one candidate at a time, so that it asks often."""
    return launch_settings(folder, llm, "search.rounds=4", "llm.proposals_per_call=1", "llm.concurrency=1")


def told(logs: list[Any]) -> list[tuple[str, str]]:
    return [(line["event"], line["log_level"]) for line in logs if line["event"] in TOLD]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("is_freed", [True, False])
async def test_a_search_goes_on_while_its_disk_is_full_and_its_files_are_complete_when_there_is_room(
    redis: Redis, keys: Keys, server: Server, disk: Disk, is_freed: bool
) -> None:
    """The disk is full from the third question until two files cannot be written, or to the end."""

    def answers(body: dict[str, Any]) -> str:
        if len(llm.asked) == 3:
            disk.fill()
        if not in_trouble and {"evaluations.jsonl", "transcript.jsonl"} <= set(launch._journal.folder_errors.files):
            in_trouble.append(len(llm.asked))
            if is_freed:
                disk.free()
        return answer(body)

    in_trouble: list[int] = []
    async with ScriptedLlm(answers) as llm, worker_there(redis, keys):
        settings = settings_for(disk.folder, llm)
        launch = Launch(settings, server.url, settings.llm.endpoints, embedded=False)
        with capture_logs() as logs:
            summary = await asyncio.wait_for(launch.run(), 90)
        disk.free()
        asked = [json.dumps(asked.body["messages"]) for asked in llm.asked]
    assert in_trouble
    assert summary is not None and summary.finished and summary.best
    assert not await redis.exists(keys.daemon)  # it has stepped down
    transcript, evaluations = (lines_of(settings.folder / f"{name}.jsonl") for name in ("transcript", "evaluations"))
    if not is_freed:
        assert told(logs)[0] == ("folder_not_written", "error")
        assert sorted(event for event, _ in told(logs)[1:]) == ["folder_incomplete", "transcript_lines_missing"]
        (missing,) = [line["lines"] for line in logs if line["event"] == "transcript_lines_missing"]
        assert len(transcript) + missing == len(asked)
        return
    assert told(logs) == [("folder_not_written", "error"), ("folder_written_again", "info")]
    assert [json.dumps(line["messages"]) for line in transcript] == asked
    assert [record["order"] for record in evaluations] == list(range(len(evaluations)))
    proposals = [record for record in evaluations if record["agent"] != "baseline"]
    assert len({record["id"] for record in proposals}) == len(proposals) == sum(summary.candidates["by_agent"].values())
    best = json.loads((settings.folder / "best.json").read_text())
    assert best["perplexity"] == summary.best.perplexity
    assert json.loads((settings.folder / "summary.json").read_text())["finished"]
    assert not [path.name for path in settings.folder.iterdir() if path.name.startswith(".")]


async def test_nothing_waits_for_the_disk_but_a_thread(
    redis: Redis, keys: Keys, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that stands still can hold up fsync for minutes, and with it the one that calls it."""
    threads: list[threading.Thread] = []
    fsync = os.fsync

    def noted(file: int) -> None:
        threads.append(threading.current_thread())
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    async with ScriptedLlm(answer) as llm, worker_there(redis, keys):
        settings = settings_for(tmp_path, llm)
        launch = Launch(settings, server.url, settings.llm.endpoints, embedded=False)
        assert await asyncio.wait_for(launch.run(), 90)
    written = {path.name for path in settings.folder.iterdir()}
    assert {"spec.json", "best.json", "evaluations.jsonl", "summary.json", "status.json"} <= written
    assert len(threads) >= 4 and threading.main_thread() not in threads


def test_a_line_for_which_there_is_no_room_leaves_no_piece(limited: LimitedFiles) -> None:
    path = limited.folder / "lines"
    lines = AppendOnlyFile(path)
    lines.append("first\n")
    with full_at(limited, path, 10), pytest.raises(OSError, match="No space left"):
        lines.append("a line of more than ten bytes\n")
    assert path.read_text() == "first\n"
    lines.append("third\n")
    assert path.read_text() == "first\nthird\n"
    lines.close()


def test_a_line_that_a_kill_has_torn_is_ended_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("first\nsec")
    lines = AppendOnlyFile(path)
    lines.append("third \ud800\n")
    lines.append("fourth\n")
    lines.close()
    assert path.read_text() == "first\nsec\nthird \\ud800\nfourth\n"


def test_a_file_that_cannot_be_replaced_stays_as_it_was(disk: Disk) -> None:
    path = disk.folder / "best.json"
    write_atomically(path, "old")
    disk.fill()
    with pytest.raises(OSError):
        write_atomically(path, "new" * 5000)
    disk.free()
    assert path.read_text() == "old"
    assert [left.name for left in disk.folder.iterdir()] == ["best.json"]


def test_of_a_transcript_too_long_to_keep_the_newest_lines_are_kept_and_the_others_counted(
    limited: LimitedFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcript, "KEPT", 100)
    file = TranscriptFile(limited.folder / "transcript.jsonl", FolderErrors(limited.folder))
    with capture_logs() as logs:
        file.add("before\n")
        limited.fill()
        for number in range(25):
            file.add(f"line {number:04}\n")
        limited.free()
        file.add("after\n")
        file.close()
    assert (limited.folder / "transcript.jsonl").read_text().split("\n") == [
        "before",
        *(f"line {number:04}" for number in range(15, 25)),
        "after",
        "",
    ]
    assert [event for event, _ in told(logs)] == [*TOLD[:2], "transcript_lines_missing"]
    assert logs[-1]["lines"] == 15
