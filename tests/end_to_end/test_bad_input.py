"""What users give wrong, and what others have left in Redis: one sentence and an exit code, never a traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from gpu_worker.__main__ import main as worker_main
from tests.support.cli import Cli
from tests.support.root import ROOT
from tests.support.samples import SPEC, write_daemon_settings
from tests.support.servers import Server

REMOTE = ("status", "best", "pause", "resume", "stop", "watch")
PASSWORD = "open-sesame-5309"


@pytest.fixture
def raw_redis(server: Server) -> Iterator[Redis]:
    """A client that writes what Self-Pruner never would."""
    with Redis.from_url(server.url, decode_responses=True) as client:
        yield client


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_daemon_settings(tmp_path, http={"enabled": False})


OF_ANOTHER_VERSION = '{"models": ["m"]}'
"""A spec that cannot be read and is not damaged; workers wait for a damaged one to be replaced."""


def worker(url: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    """`python -m gpu_worker`, to its end."""
    command = [sys.executable, "-m", "gpu_worker", *flags]
    environment = {**os.environ, "SELFPRUNER_REDIS__URL": url}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", REMOTE)
def test_a_spec_that_cannot_be_read_is_told_of(raw_redis: Any, server: Server, cli: Cli, command: str) -> None:
    asked = (command, "--search", "test", "--redis-url", server.url)
    raw_redis.set("selfpruner:test:spec", "garbage")
    assert "the Redis key selfpruner:test:spec cannot be read" in cli.error(*asked, code=1)
    raw_redis.delete("selfpruner:test:spec")
    raw_redis.lpush("selfpruner:test:spec", "a list")
    assert "WRONGTYPE" in cli.error(*asked, code=1)


@pytest.mark.parametrize("key", ["profile", "condition"])
def test_what_else_a_status_reads_may_be_of_another_version(raw_redis: Any, server: Server, cli: Cli, key: str) -> None:
    raw_redis.set("selfpruner:test:spec", SPEC.model_dump_json())
    raw_redis.set(f"selfpruner:test:{key}", '{"degraded": 7}')
    told = cli.error("status", "--search", "test", "--redis-url", server.url, code=1)
    assert f"selfpruner:test:{key} cannot be read" in told


def test_a_worker_of_another_version_hides_nothing_of_the_status(raw_redis: Any, server: Server, cli: Cli) -> None:
    raw_redis.set("selfpruner:test:spec", SPEC.model_dump_json())
    raw_redis.set("selfpruner:test:worker:w", "garbage")
    raw_redis.set("selfpruner:test:worker:x", '{"stage": "idle"}')
    (shown,) = cli.answer("status", "--search", "test", "--redis-url", server.url)["workers"]
    assert (shown["consumer"], shown["stage"]) == ("x", "idle")


def test_the_daemon_and_a_worker_end_with_a_sentence_at_a_spec_that_cannot_be_read(
    raw_redis: Any, server: Server, config: Path, cli: Cli
) -> None:
    for write in (raw_redis.set, raw_redis.lpush):
        raw_redis.flushall()
        write("selfpruner:test:spec", OF_ANOTHER_VERSION)
        code, _, err = cli.run("daemon", config, "--set", f"redis.url={server.url}")
        done = worker(server.url, "--search", "test")
        assert code == done.returncode == 1
        for told in (err, done.stderr):
            assert "Traceback" not in told and told.splitlines()[-1].startswith("selfpruner: ")


@pytest.mark.parametrize("command", REMOTE)
def test_a_user_who_may_not_is_told_so(raw_redis: Any, server: Server, cli: Cli, command: str) -> None:
    raw_redis.execute_command("ACL", "SETUSER", "joe", "on", f">{PASSWORD}", "~other:*", "+@all")
    path = server.url.removeprefix("unix://")
    told = cli.error(command, "--redis-url", f"unix://joe:{PASSWORD}@{path}")
    assert "the server refuses its user a command" in told
    told = cli.error(command, "--redis-url", f"unix://joe:wrong-{PASSWORD}@{path}")
    assert "the server refuses the user or the password" in told and PASSWORD not in told
    raw_redis.execute_command("ACL", "DELUSER", "joe")


def test_the_daemon_and_a_worker_do_not_wait_for_a_server_that_refuses_their_password(
    raw_redis: Any, server: Server, config: Path, cli: Cli
) -> None:
    url = server.url.replace("unix://", f"unix://joe:{PASSWORD}@")
    code, _, err = cli.run("daemon", config, "--set", f"redis.url={url}")
    done = worker(url, "--search", "test")
    assert code == done.returncode == 2
    assert all("the server refuses the user or the password" in told for told in (err, done.stderr))


@pytest.mark.parametrize("command", REMOTE)
def test_a_redis_url_that_is_none_is_refused(cli: Cli, command: str) -> None:
    assert "redis.url is not a Redis URL" in cli.error(command, "--redis-url", "redis://[::1")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lease-seconds", "0"], "--lease-seconds cannot be 0"),
        (["--lease-seconds", "-1"], "--lease-seconds cannot be -1"),
        (["--lease-seconds", "0.0001"], "--lease-seconds cannot be 0.0001"),
        (["--lease-seconds", "nan"], "--lease-seconds cannot be nan"),
        (["--lease-seconds", "1e300"], "--lease-seconds cannot be 1e+300"),
        (["--grace-seconds", "-1"], "--grace-seconds cannot be -1"),
        (["--grace-seconds", "nan"], "--grace-seconds cannot be nan"),
        (["--max-evaluation-seconds", "0"], "--max-evaluation-seconds cannot be 0"),
        (["--max-preparation-seconds", "inf"], "--max-preparation-seconds cannot be inf"),
        (["--search", "bad name"], "search.name 'bad name' is not allowed"),
        (["--search", ""], "search.name '' is not allowed"),
        (["--redis-url", "redis://[::1"], "redis.url is not a Redis URL"),
        (["--redis-password-file", "nowhere"], "redis.password_file 'nowhere' cannot be read"),
    ],
)
def test_a_workers_flags_are_checked_by_whichever_way_it_is_started(
    flags: list[str], said: str, cli: Cli, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said in cli.error("worker", *flags)
    monkeypatch.setattr(sys, "argv", ["gpu_worker", *flags])
    assert worker_main() == 2 and said in capsys.readouterr().err


def test_a_worker_that_is_started_as_a_module_takes_the_password_from_a_file(
    raw_redis: Any, server: Server, tmp_path: Path
) -> None:
    raw_redis.execute_command("ACL", "SETUSER", "joe", "on", f">{PASSWORD}", "~*", "+@all")
    raw_redis.set("selfpruner:test:spec", OF_ANOTHER_VERSION)  # which only a client that was let in can find
    (tmp_path / "password").write_text(PASSWORD)
    flags = ["--search", "test", "--redis-password-file", str(tmp_path / "password")]
    done = worker(server.url.replace("://", "://joe@"), *flags)
    raw_redis.execute_command("ACL", "DELUSER", "joe")
    assert "the Redis key selfpruner:test:spec cannot be read" in done.stderr


def test_files_that_cannot_be_written_are_named(config: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").touch()
    daemon = ("daemon", config, "--set", "redis.url=redis://h")
    assert "run.folder: " in cli.error(*daemon, "--set", f"run.folder={tmp_path}/file")
    (tmp_path / "runs" / "test" / "log.jsonl").mkdir(parents=True)
    assert "log.jsonl cannot be written" in cli.error(*daemon)
    done = worker("redis://127.0.0.1:1", "--log-file", str(tmp_path / "runs"))
    assert done.returncode == 2 and "--log-file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["", "[]", '{"search": 3}', "{"])
def test_a_status_file_that_is_damaged_is_named(tmp_path: Path, cli: Cli, content: str) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "status.json").write_text(content)
    assert "test" in cli.error("status", "--search", "test", "--folder", tmp_path)


@pytest.mark.parametrize("command", ["status", "watch"])
def test_nothing_but_the_answer_is_on_stdout(raw_redis: Any, server: Server, cli: Cli, command: str) -> None:
    raw_redis.set("selfpruner:test:spec", SPEC.model_dump_json())
    raw_redis.set("selfpruner:test:control", "fly")
    raw_redis.set("selfpruner:test:condition", '{"finished": true}')
    code, out, err = cli.run(command, "--search", "test", "--redis-url", server.url, "--json")
    assert code == 0 and {json.loads(line).get("control", "run") for line in out.splitlines()} == {"run"}
    assert "control_not_understood" in err and "control_not_understood" not in out
