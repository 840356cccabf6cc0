"""The list of all searches, in a folder and on a server."""

from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from daemon.monitor.remote import chosen_search, statuses
from protocol.queue.keys import Keys
from tests.support.cli import Cli
from tests.support.samples import PROFILE, SPEC, STATUS
from tests.support.servers import Server


def keep(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "log.jsonl").touch()
    (folder / name / "status.json").write_text(text)


def test_the_searches_of_a_folder_are_listed_and_the_only_one_is_taken(tmp_path: Path, cli: Cli) -> None:
    assert cli.run("list", "--folder", tmp_path / "none") == (0, "there is no search here\n", "")
    better = STATUS.model_copy(update={"finished": True, "best_to_uniform": 0.61725})
    keep(tmp_path, "one", better.model_dump_json())
    (tmp_path / "lessons").mkdir()
    assert chosen_search(None, None, tmp_path) == "one"
    keep(tmp_path, "two", "{}")
    _, shown, _ = cli.run("list", "--folder", tmp_path)
    one, two = shown.splitlines()[1:]
    assert one.split() == ["one", "tiny", "30%", "finished", "5", "0.617"] and "cannot be read" in two
    found = cli.answer("list", "--folder", tmp_path)
    assert found["one"]["measured"] == 5 and found["two"] is None


def test_of_several_searches_one_must_be_chosen(tmp_path: Path, cli: Cli) -> None:
    for name in ("one", "two"):
        keep(tmp_path, name, STATUS.model_dump_json())
    told = cli.error("status", "--folder", tmp_path)
    assert f"there are 2 searches in {tmp_path}/; choose with --search: one, two" in told
    keep(tmp_path, "default", STATUS.model_dump_json())
    assert chosen_search(None, None, tmp_path) == "default"


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ({"measured": 0, "finished": False}, "has measured no candidate yet, and is not running now: `selfpruner run`"),
        ({"measured": 3, "finished": False}, "is not running now: `selfpruner run` with its settings resumes it"),
        ({"measured": 3, "finished": True}, "has finished; a larger search.max_evaluations lengthens it"),
        (None, "is not running now: `selfpruner run` with its settings resumes it"),
    ],
)
def test_why_a_search_cannot_be_told_anything_is_said(
    tmp_path: Path, cli: Cli, status: dict[str, Any] | None, says: str
) -> None:
    keep(tmp_path, "one", "{}" if status is None else STATUS.model_copy(update=status).model_dump_json())
    assert f"the search 'one' in {tmp_path}/ {says}" in cli.error("pause", "--folder", tmp_path)


async def test_the_searches_of_a_server_are_listed(redis: Redis, server: Server, tmp_path: Path) -> None:
    for name in ("b", "a"):
        await redis.set(Keys(name).spec, SPEC.model_dump_json())
    await redis.set(Keys("a").profile, PROFILE.model_dump_json())
    await redis.set("selfpruner:broken name:spec", "{}")
    await redis.set("other", "x")
    found = await statuses(server.url, tmp_path)
    assert list(found) == ["a", "b"] and found["a"] is not None
    assert (found["a"].model, found["a"].measured, found["a"].dense_perplexity) == ("tiny", 0, 10.0)
