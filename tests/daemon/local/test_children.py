"""Children of the daemon: real processes that die, cannot be started, and are told no secrets."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from daemon.local.children import Child
from protocol.errors import UsageError
from tests.support.servers import eventually

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]
SECRETS = {
    "OPENAI_API_KEY": "sk-1",
    "AZURE_OPENAI_KEY": "sk-2",
    "SELFPRUNER_LLM__ENDPOINTS": '[{"api_key": "sk-3"}]',
    "selfpruner_llm": '{"endpoints": [{"api_key": "sk-4"}]}',
    "SELFPRUNER_HTTP__TOKEN": "sk-5",
    "SELFPRUNER_REDIS__URL": "redis://:sk-6@host",
    "AWS_SECRET_ACCESS_KEY": "sk-7",
    "DB_PASSWORD": "sk-8",
}
"""Each in a name that means something to somebody."""


def running() -> list[psutil.Process]:
    """This process's children that sleep, once they are what they were started as."""
    found = []
    for process in psutil.Process().children():
        with_command = process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[1:] == SLEEPS[1:]
        found += [process] if with_command else []
    return found


@asynccontextmanager
async def started(child: Child) -> AsyncIterator[psutil.Process]:
    await child.start()
    try:
        yield await the_process()
    finally:
        await child.end()


async def the_process() -> psutil.Process:
    await eventually(running)
    (process,) = running()
    return process


@pytest.mark.parametrize("loads_models", [False, True])
async def test_a_child_is_told_no_secret_but_the_hubs_if_it_needs_it(
    loads_models: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SECRETS, "HF_TOKEN": "hf", "HF_HUB_OFFLINE": "1", "MONKEY": "1"}.items():
        monkeypatch.setenv(name, value)
    child = Child("c", SLEEPS, loads_models=loads_models, environment={"SELFPRUNER_REDIS__URL": "unix:///given"})
    async with started(child) as process:
        environment = process.environ()
    assert "sk-" not in str(environment)
    assert environment["SELFPRUNER_REDIS__URL"] == "unix:///given"
    assert environment["PATH"] and environment["MONKEY"] and environment["HF_HUB_OFFLINE"]
    assert environment.get("HF_TOKEN") == ("hf" if loads_models else None)


async def test_a_child_that_cannot_be_started_again_is_tried_until_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    child = Child("c", SLEEPS, quiet=folder / "c.log")

    def told(*events: str) -> list[dict[str, Any]]:
        return [dict(line) for line in logs if line["event"] in events]

    with capture_logs() as logs:
        async with started(child) as process:
            (folder / "c.log").unlink()
            folder.rmdir()
            process.kill()

            await eventually(lambda: told("child_not_started"))
            await asyncio.sleep(1.5)  # for further tries
            folder.mkdir()
            again = await the_process()
            assert again.pid != process.pid

            await eventually(lambda: told("child_started"))
    events = told("child_not_started", "child_started")
    assert [(line["event"], line["log_level"], line["child"]) for line in events] == [
        ("child_not_started", "error", "c"),
        ("child_started", "info", "c"),
    ]
    assert str(folder) in events[0]["error"]


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
async def test_a_child_writes_its_log_into_nothing_but_a_file(tmp_path: Path, kind: str) -> None:
    file, victim = tmp_path / "child.log", tmp_path / "victim"
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "link":
            file.symlink_to(victim)
        case _:
            file.mkdir()
    child = Child("test", SLEEPS, quiet=file)
    async with asyncio.timeout(10):
        with pytest.raises(UsageError, match="test cannot be started, with its log in"):
            await child.start()
    assert not victim.exists()


async def test_a_child_that_ends_with_its_last_word_is_not_started_again() -> None:
    child = Child("c", [sys.executable, "-c", "raise SystemExit(2)"], final=2)
    with capture_logs() as logs:
        await child.start()

        await eventually(lambda: child.has_given_up)
        await child.end()
    assert not logs


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_command_whose_parent_died_before_it_began_is_not_run(tmp_path: Path) -> None:
    """The process that starts it is another than the one that wanted it, as after the death of the latter."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    ran = tmp_path / "ran"
    command = [sys.executable, "-c", f"open({str(ran)!r}, 'w')"]
    for parent, runs in ((gone.pid, False), (os.getpid(), True)):
        done = subprocess.run(
            [sys.executable, "-m", "daemon.local.end_with_parent", str(parent), *command], check=False
        )
        assert (done.returncode == 0, ran.exists()) == (runs, runs)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
async def test_a_child_ends_when_its_parent_is_killed() -> None:
    code = f"import asyncio, daemon.local.children as c\nchild = c.Child('c', {SLEEPS!r})\n"
    code += "async def main():\n await child.start()\n await asyncio.sleep(600)\nasyncio.run(main())"
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    children: list[psutil.Process] = []

    async def runs() -> bool:
        children[:] = [p for p in psutil.Process(parent.pid).children() if p.cmdline()[1:] == SLEEPS[1:]]
        return bool(children)

    await eventually(runs)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()

    await eventually(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children))
