"""A search's folder that others change while it runs: noticed, logged once, and written anew, never through a link."""

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis
from structlog.testing import capture_logs

from daemon.http_api.token import open_access
from daemon.launch.launch import Launch
from daemon.settings.settings import Settings
from daemon.state import journal
from daemon.state.folder_errors import FolderErrors
from daemon.state.transcript import TranscriptFile
from protocol.queue.keys import Keys
from protocol.runtime import files, logs
from protocol.runtime.files import AppendOnlyFile, AtomicFile, write_atomically
from tests.daemon.launch.test_launch import worker_there
from tests.daemon.state.test_full_disk import lines_of, settings_for
from tests.support.disks import LimitedFiles
from tests.support.schema_answers import answer
from tests.support.scripted_llm import ScriptedLlm
from tests.support.servers import Server

pytestmark = pytest.mark.one_server

FILES = ["spec.json", "profile.json", "best.json", "evaluations.jsonl", "transcript.jsonl", "http-token", "status.json"]


def removes_the_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink(missing_ok=True)  # the daemon replaces files meanwhile


def writes_garbage(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "log.jsonl":
            path.write_text("garbage")


def puts_others(put: Callable[[Path], object]) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        (folder.parent / "victim").write_text("mine")
        for name in FILES:
            (folder / name).unlink()
            put(folder / name)

    return attack


ATTACKS: dict[str, Callable[[Path], object]] = {
    "removes the folder": lambda folder: shutil.rmtree(folder, ignore_errors=True),  # the daemon writes meanwhile
    "moves the folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "removes the files": removes_the_files,
    "writes garbage": writes_garbage,
    "links to somebody else's file": puts_others(lambda path: path.symlink_to(path.parent.with_name("victim"))),
    "puts pipes": puts_others(os.mkfifo),
}


async def searched(server: Server, llm: ScriptedLlm, folder: Path) -> Settings:
    """Search to the end with everything that the folder of a search holds."""
    settings = settings_for(folder, llm)
    settings.folder.mkdir(parents=True)
    logs.configure(file=settings.folder / "log.jsonl", console=False)
    access = open_access(settings.http, settings.folder)
    launch = Launch(settings, server.url, settings.llm.endpoints, embedded=False, access=access)
    summary = await asyncio.wait_for(launch.run(), 90)
    assert summary is not None and summary.finished
    return settings


def is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


@pytest.mark.usefixtures("restored_logs")
@pytest.mark.parametrize("attack", ATTACKS)
async def test_what_others_remove_or_change_is_noticed_and_written_anew(
    redis: Redis, keys: Keys, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    monkeypatch.setattr(journal, "RETRY_SECONDS", 0.1)
    begun = asyncio.Event()

    def answers(body: dict[str, Any]) -> str:
        if len(llm.asked) == 6:
            begun.set()
        return answer(body)

    async def attacked(folder: Path) -> None:
        await begun.wait()
        while not all((folder / name).exists() for name in FILES):
            await asyncio.sleep(0.01)
        ATTACKS[attack](folder)

    async with ScriptedLlm(answers) as llm, worker_there(redis, keys):
        attacking = asyncio.create_task(attacked(tmp_path / "test"))
        settings = await searched(server, llm, tmp_path)
        await attacking
        asked = [json.dumps(asked.body["messages"]) for asked in llm.asked]
    folder = settings.folder
    assert all(is_plain(folder / name) for name in [*FILES, "log.jsonl", "summary.json"])
    evaluations = lines_of(folder / "evaluations.jsonl")
    assert [record["order"] for record in evaluations] == list(range(len(evaluations)))
    assert len(evaluations) == await redis.llen(keys.applied)
    for name in ("spec.json", "profile.json", "best.json", "status.json"):
        assert json.loads((folder / name).read_text())
    assert (folder / "http-token").stat().st_mode & 0o777 == 0o600
    if attack != "writes garbage":
        assert [json.dumps(line["messages"]) for line in lines_of(folder / "transcript.jsonl")] == asked
    logged = lines_of(folder / "log.jsonl")
    told = [line for line in logged if line["event"] == "folder_changed"]
    if attack not in ("removes the folder", "moves the folder"):  # in that moment, a write may find no folder
        assert "folder_not_written" not in {line["event"] for line in logged}
    names = [name for line in told for name in line["files"]]
    assert set(names) == set(FILES) and len(told) <= len(FILES)
    if attack.startswith(("removes", "moves")):  # it takes a moment, in which the daemon may look at its files
        assert len(names) == len(FILES), "each file is told once"
    assert "folder_incomplete" not in {line["event"] for line in logged}
    if attack.startswith("links"):
        assert (folder.parent / "victim").read_text() == "mine"


def test_a_line_that_others_have_torn_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = AppendOnlyFile(path)
    lines.append('{"number": 1}\n')
    lines.append('{"number": 2}\n')
    os.truncate(path, path.stat().st_size - 7)
    assert lines.is_changed
    lines.append('{"number": 3}\n')
    assert not lines.is_changed
    assert path.read_text() == '{"number": 1}\n{"numbe\n{"number": 3}\n'
    os.truncate(path, 0)
    lines.append('{"number": 4}\n')
    lines.close()
    assert path.read_text() == '{"number": 4}\n'


@pytest.mark.parametrize("is_moved", [False, True])
def test_of_those_who_share_a_file_that_is_gone_one_brings_it_back_with_its_lines(
    tmp_path: Path, is_moved: bool
) -> None:
    path = tmp_path / "folder" / "lines"
    path.parent.mkdir()
    sharers = [AppendOnlyFile(path, shared=True) for _ in range(3)]
    for number, lines in enumerate(sharers):
        lines.append(f"{number}\n")
    if is_moved:
        path.parent.rename(tmp_path / "moved")
    else:
        shutil.rmtree(path.parent)
    assert all(lines.is_gone and lines.is_moved == is_moved for lines in sharers)
    assert [lines.restore() for lines in sharers] == [True, False, False]
    for number, lines in enumerate(sharers):
        lines.append(f"{number + 3}\n")
        lines.close()
    assert path.read_text().split() == [str(number) for number in range(6)]
    assert [left.name for left in path.parent.iterdir()] == ["lines"]


def a_link(path: Path) -> None:
    path.symlink_to(path.with_name("victim"))


@pytest.mark.parametrize("obstacle", [a_link, Path.mkdir, os.mkfifo], ids=["link", "folder", "pipe"])
def test_shared_lines_are_written_into_nothing_but_a_regular_file(
    tmp_path: Path, obstacle: Callable[[Path], None]
) -> None:
    (tmp_path / "victim").write_text("mine")
    path = tmp_path / "lines"
    lines = AppendOnlyFile(path, shared=True)
    lines.append("first\n")
    path.unlink()
    obstacle(path)
    with pytest.raises(OSError):
        AppendOnlyFile(path)
    assert lines.is_changed
    with pytest.raises(OSError):
        lines.restore()
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert lines.restore()
    lines.append("second\n")
    lines.close()
    assert path.read_text() == "first\nsecond\n"
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_file_is_replaced_and_no_link_in_its_place_or_beside_it_is_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "new" / "best.json"
    victim.write_text("mine")
    path.parent.mkdir()
    path.symlink_to(victim)
    path.with_name(f".best.json.{os.getpid()}").symlink_to(victim)
    write_atomically(path, "ours")
    assert (path.read_text(), path.is_symlink(), victim.read_text()) == ("ours", False, "mine")
    shutil.rmtree(path.parent)
    write_atomically(path, "ours", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_document_knows_its_text_whoever_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    document = AtomicFile(path)
    assert not document.is_gone and not document.is_changed
    document.write("ours")
    assert not document.is_gone and not document.is_changed
    write_atomically(path, "ours")
    assert not document.is_changed
    for text in ("hers", "longer than ours", ""):
        write_atomically(path, text)
        assert document.is_changed and not document.is_gone
    path.unlink()
    assert document.is_changed and document.is_gone
    document.write_again()
    assert path.read_text() == "ours" and not document.is_changed


@pytest.mark.usefixtures("restored_logs")
def test_a_log_file_that_is_removed_comes_back_and_one_that_is_moved_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "log.jsonl"
    path.parent.mkdir()
    logs.configure(file=path, console=False)
    structlog.get_logger().info("first")
    shutil.rmtree(path.parent)
    structlog.get_logger().info("second")
    assert [line["event"] for line in lines_of(path)] == ["first", "second", "log_removed"]
    path.rename(path.with_name("log.jsonl.1"))
    structlog.get_logger().info("third")
    assert [line["event"] for line in lines_of(path)] == ["third"]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the parts of removed files that are copied."""
    parts: list[int] = []
    content = AppendOnlyFile._content

    def counted(self: AppendOnlyFile) -> Iterator[bytes]:
        for part in content(self):
            parts.append(len(part))
            yield part

    monkeypatch.setattr(AppendOnlyFile, "_content", counted)
    return parts


@pytest.mark.parametrize("shared", [False, True])
def test_of_a_long_file_that_is_removed_nothing_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: list[int], shared: bool
) -> None:
    path = tmp_path / "lines"
    lines = AppendOnlyFile(path, shared=shared)
    lines.append("old\n")
    monkeypatch.setattr(files, "LARGEST_COPY_BYTES", 3)
    path.unlink()
    assert lines.restore() and lines.lost and not copied
    lines.append("new\n")
    assert path.read_text() == "new\n"
    monkeypatch.setattr(files, "LARGEST_COPY_BYTES", 4)
    path.unlink()
    assert lines.restore() and not lines.lost
    assert path.read_text() == "new\n"
    lines.close()


@pytest.mark.parametrize("shared", [False, True])
def test_a_removed_file_that_could_not_be_copied_is_not_copied_again(
    tmp_path: Path, copied: list[int], shared: bool
) -> None:
    path = tmp_path / "lines"
    lines = AppendOnlyFile(path, shared=shared)
    lines.append("much too long\n")
    disk = LimitedFiles(tmp_path)
    path.unlink()
    disk.fill(4)
    try:
        with pytest.raises(OSError):
            lines.restore()
        assert copied == [14] and not path.exists()
        assert lines.restore() and lines.lost
        assert copied == [14]
        lines.append("new\n")
    finally:
        disk.free()
    assert path.read_text() == "new\n"
    path.unlink()
    assert lines.restore() and not lines.lost, "another removal is another try"
    assert path.read_text() == "new\n"
    lines.close()


@pytest.mark.usefixtures("restored_logs")
def test_a_log_file_that_is_begun_anew_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    logs.configure(file=path, console=False)
    structlog.get_logger().info("first")
    monkeypatch.setattr(files, "LARGEST_COPY_BYTES", 3)
    path.unlink()
    structlog.get_logger().info("second")
    assert [(line["event"], line.get("lines_kept")) for line in lines_of(path)] == [
        ("second", None),
        ("log_removed", False),
    ]


def test_a_transcript_that_is_begun_anew_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "transcript.jsonl"
    transcript = TranscriptFile(path, FolderErrors(tmp_path))
    transcript.add("first\n")
    monkeypatch.setattr(files, "LARGEST_COPY_BYTES", 3)
    path.unlink()
    with capture_logs() as log:
        transcript.add("second\n")
        transcript.add("third\n")
    assert [line["event"] for line in log if line["event"] == "transcript_begun_anew"] == ["transcript_begun_anew"]
    transcript.close()
    assert path.read_text() == "second\nthird\n"
