"""Experiment trackers: real ones, fed by real searches with a scripted LLM, and read back as their users do."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from redis.asyncio import Redis
from structlog.testing import capture_logs

from agents.population.population import Population
from daemon.launch.launch import Launch
from daemon.monitor.summary import Summary
from daemon.settings.service import TrackerName
from daemon.settings.settings import Settings
from daemon.trackers import trackers
from daemon.trackers.kinds import KINDS, check_trackers, environment
from daemon.trackers.points import Curves
from daemon.trackers.process import Start
from protocol.errors import SettingsError
from protocol.plans.candidate import Failed
from protocol.queue.keys import Keys
from tests.daemon.launch.test_launch import KEY, settings_for, worker_there
from tests.support.cli import Cli
from tests.support.disks import SmallDisk, mounted
from tests.support.root import ROOT
from tests.support.samples import PROFILE, SPEC, candidates, measured, write_daemon_settings
from tests.support.schema_answers import answer
from tests.support.scripted_llm import Handler, ScriptedLlm, says
from tests.support.servers import Server, eventually

pytestmark = pytest.mark.one_server

PATIENCE = 90.0
"""Seconds that a tracker may take to load on a busy machine."""


def needs(name: TrackerName) -> None:
    missing = [package for package in KINDS[name].packages if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: `make test-trackers` does")


@pytest.fixture(params=list(KINDS))
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TrackerName:
    """A tracker that is installed, without the user's own settings of it."""
    needs(request.param)
    for variable in list(os.environ):
        if variable.startswith(KINDS[request.param].own or "TENSORBOARD_"):
            monkeypatch.delenv(variable)
    monkeypatch.setattr(trackers, "END_SECONDS", PATIENCE)
    return request.param  # type: ignore[no-any-return]


class Llm(ScriptedLlm):
    """Answers; while it `thinks`, it answers no question after the first."""

    def __init__(self) -> None:
        super().__init__(self._says)
        self.thinks = False

    def _says(self, body: dict[str, Any]) -> str | Handler:
        if not self.thinks or len(self.asked) == 1:
            return answer(body)

        async def later(request: web.Request) -> web.StreamResponse:
            await eventually(lambda: not self.thinks, PATIENCE)
            return await says(answer(body))(request)

        return later


@pytest.fixture
async def llm() -> AsyncIterator[Llm]:
    async with Llm() as llm:
        yield llm


def launched(server: Server, settings: Settings) -> Launch:
    return Launch(settings, server.url, settings.llm.endpoints, embedded=False)


async def searched(server: Server, settings: Settings) -> Summary:
    """Search to the end."""
    summary = await asyncio.wait_for(launched(server, settings).run(), PATIENCE * 2)
    assert summary is not None and summary.finished and summary.best
    return summary


async def read(name: str, settings: Settings) -> dict[str, Any]:
    """What the tracker has kept, read by a process of its own."""
    command = [sys.executable, "-m", "tests.support.tracker_readers", name, str(settings.folder / name)]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    kept: dict[str, Any] = json.loads(out)
    return kept


def proposals(settings: Settings) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (settings.folder / "evaluations.jsonl").read_text().splitlines()]
    return [line for line in lines if line["agent"] != "baseline"]


def steps(kept: dict[str, Any], curve: str = "llm/completion_tokens") -> list[int]:
    return [step for step, _ in kept["curves"][curve]]


def close(curve: list[list[float]], values: list[float]) -> bool:
    """Whether a curve has these values from the first step on; TensorBoard keeps seven digits."""
    return curve == [[step, pytest.approx(value, rel=1e-6)] for step, value in enumerate(values, 1)]


async def test_curves_rates_settings_and_report_of_two_processes_are_read_back_as_one_run(
    redis: Redis, keys: Keys, server: Server, llm: Llm, tmp_path: Path, name: TrackerName
) -> None:
    """The reader fails if there are two runs."""
    chosen = [f"run.trackers=[{name}]", "redis.url=redis://:password-of-redis@h"]
    settings = settings_for(tmp_path, llm, *chosen)
    async with worker_there(redis, keys):
        with capture_logs() as logs:
            first = await searched(server, settings_for(tmp_path, llm, *chosen, "search.rounds=1"))
            summary = await searched(server, settings)
    assert not [line for line in logs if line["event"].startswith("tracker")]
    kept = await read(name, settings)
    fitness = [each["outcome"]["perplexity"] for each in proposals(settings)]
    best, (uniform, dense) = list(accumulate(fitness, min)), (summary.uniform.perplexity, summary.dense.perplexity)
    assert uniform and dense
    curves = kept["curves"]
    assert close(curves["fitness"], fitness) and close(curves["best"], best)
    assert close(curves["dense"], [dense] * len(fitness))
    known = steps(kept, "uniform")
    assert known == list(range(known[0], len(fitness) + 1)), "from when it was measured"
    assert [value for _, value in curves["uniform"]] == pytest.approx([uniform] * len(known))
    assert [value for _, value in curves["best_to_uniform"]] == pytest.approx([best[i - 1] / uniform for i in known])
    before = sum(first.candidates["by_agent"].values())
    assert before < len(fitness)
    for kind in ("prompt", "completion"):
        used = [value for _, value in curves[f"llm/{kind}_tokens"]]
        assert used == sorted(used) and used[-1] == summary.tokens[kind] > first.tokens[kind] >= used[before - 1] > 0
    improved = [step for step, value in enumerate(fitness, 1) if value < min(fitness[: step - 1], default=math.inf)]
    for number, rate in enumerate(summary.rates):
        assert steps(kept, f"rates/layer {number}") == improved
        assert curves[f"rates/layer {number}"][-1][1] == pytest.approx(rate)
    shown = kept["settings"]
    assert (shown["search.name"], shown["search.rounds"], shown["target.rate"]) == ("test", "2", "0.3")
    assert json.loads(shown["llm.endpoints"])[0]["api_key"] == "**********"
    assert shown["redis.url"] == "redis://:***@h"
    for path in (settings.folder / name).rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert KEY.encode() not in content and b"password-of-redis" not in content, path
    if name != "tensorboard":
        assert kept["report"] == (settings.folder / "report.html").read_text()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"], indirect=True)
async def test_a_tracker_that_is_killed_is_left_off_and_goes_on_after_a_restart(
    redis: Redis, keys: Keys, server: Server, llm: Llm, tmp_path: Path, name: TrackerName
) -> None:
    settings = settings_for(tmp_path, llm, f"run.trackers=[{name}]")
    llm.thinks = True

    async def has_points() -> bool:
        try:
            return bool(steps(await read(name, settings)))
        except (AssertionError, KeyError):
            return name == "wandb" and bool(list((settings.folder / name).glob("wandb/offline-run-*/*.wandb")))

    async with worker_there(redis, keys):
        launch = launched(server, settings)
        with capture_logs() as logs:
            running = asyncio.create_task(launch.run())
            await eventually(has_points, PATIENCE)
            (feed,) = launch._trackers._feeds
            assert feed._process
            os.killpg(feed._process.pid, signal.SIGKILL)
            llm.thinks = False
            await asyncio.wait_for(running, PATIENCE)
        assert [line["error"] for line in logs if line["event"] == "tracker_failed"] == [
            "its process has ended with status -9"
        ]
        await searched(server, settings)
    written = steps(await read(name, settings))
    assert written == sorted(set(written)), "none twice"
    if name != "wandb":  # W&B writes at intervals of 15 seconds
        assert written == list(range(1, len(proposals(settings)) + 1))


@asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """The URL of a server that never answers, and the connections that were made to it."""
    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1")
    host, port = server.sockets[0].getsockname()
    yield f"http://{host}:{port}", connections
    server.close()
    for writer in connections:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize("name", ["wandb"], indirect=True)
async def test_wandb_sends_nothing_unless_the_environment_says_so(
    redis: Redis,
    keys: Keys,
    server: Server,
    llm: Llm,
    tmp_path: Path,
    name: TrackerName,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_for(tmp_path, llm, f"run.trackers=[{name}]", "search.rounds=0")
    async with silent_server() as (url, connections), worker_there(redis, keys):
        for variable in ("WANDB_BASE_URL", "HTTPS_PROXY", "HTTP_PROXY"):
            monkeypatch.setenv(variable, url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1:1")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        await searched(server, settings)
        assert not connections and steps(await read(name, settings))


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # it does not listen
        yield bound.getsockname()[1]


@pytest.mark.parametrize("name", ["mlflow"], indirect=True)
async def test_a_tracker_that_raises_is_logged_once_with_its_reason(
    redis: Redis,
    keys: Keys,
    server: Server,
    llm: Llm,
    tmp_path: Path,
    name: TrackerName,
    monkeypatch: pytest.MonkeyPatch,
    closed_port: int,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    async with worker_there(redis, keys):
        with capture_logs() as logs:
            await searched(server, settings_for(tmp_path, llm, f"run.trackers=[{name}]"))
    (failed,) = [line for line in logs if line["event"] == "tracker_failed"]
    assert (failed["tracker"], failed["log_level"]) == ("mlflow", "warning")
    assert str(closed_port) in failed["error"] and "\n" not in failed["error"]
    assert "Traceback" in (tmp_path / "test" / "mlflow.log").read_text()


def test_a_long_error_of_a_tracker_is_told_in_short_and_without_passwords(tmp_path: Path) -> None:
    """What is not read from a pipe at once must fit into it."""
    begins = "def begin(*_): raise RuntimeError('http://bob:hunter2@host ' + 'long ' * 200_000)"
    program = (
        f"import sys, types\n{begins}\nsys.modules['daemon.trackers.odd'] = types.SimpleNamespace(begin=begin)\n"
        f"from daemon.trackers.process import main\nsys.argv = ['', 'odd', {str(tmp_path)!r}]\nmain()"
    )
    start = Start(search="test", settings={}).model_dump_json()
    ended = subprocess.run([sys.executable, "-c", program], input=f"{start}\n", capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout.startswith("RuntimeError: http://bob")
    assert len(ended.stdout) <= 1000 and "Traceback" in ended.stderr and "hunter2" not in ended.stderr


def test_mlflow_cannot_keep_its_database_in_every_folder(
    tmp_path: Path, llm: Llm, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path / "100%", llm, "run.trackers=[mlflow]")
    with pytest.raises(SettingsError, match=r"because of the '%': choose another run\.folder"):
        check_trackers(settings)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    check_trackers(settings)


@pytest.mark.parametrize("name", ["mlflow"], indirect=True)
async def test_a_tracker_that_hangs_is_killed_at_the_end(
    redis: Redis,
    keys: Keys,
    server: Server,
    llm: Llm,
    tmp_path: Path,
    name: TrackerName,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its server takes the connection and never answers."""
    async with silent_server() as (url, connections), worker_there(redis, keys):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        llm.thinks = True
        launch = launched(server, settings_for(tmp_path, llm, f"run.trackers=[{name}]"))
        with capture_logs() as logs:
            running = asyncio.create_task(launch.run())
            await eventually(lambda: connections, PATIENCE)
            (feed,) = launch._trackers._feeds
            process = feed._process
            monkeypatch.setattr(trackers, "END_SECONDS", 0.5)
            llm.thinks = False
            summary = await running
    assert summary and summary.finished
    assert process and process.returncode == -signal.SIGKILL
    (failed,) = [line for line in logs if line["event"] == "tracker_failed"]
    assert failed["error"] == "it has not ended within 0.5 seconds"


@pytest.mark.parametrize("name", ["tensorboard"], indirect=True)
async def test_a_full_disk_leaves_the_tracker_off(
    redis: Redis, keys: Keys, server: Server, llm: Llm, tmp_path: Path, name: TrackerName
) -> None:
    with mounted(SmallDisk(tmp_path / "disk")) as disk:
        if disk is None:
            pytest.skip("only root may make a small disk (mount -t tmpfs)")
        settings = settings_for(disk.folder, llm, f"run.trackers=[{name}]")
        disk.fill()
        async with worker_there(redis, keys):
            with capture_logs() as logs:
                await searched(server, settings)
    assert len([line for line in logs if line["event"] == "tracker_failed"]) == 1


@pytest.mark.parametrize("name", KINDS)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: TrackerName
) -> None:
    package = KINDS[name].packages[0]
    monkeypatch.setattr("daemon.settings.packages.find_spec", lambda _: None)
    config = write_daemon_settings(tmp_path, http={"enabled": False})
    chosen = ["--set", f"run.trackers=[{name}]", "--set", "redis.url=unix:///nowhere"]
    assert cli.error("daemon", config, *chosen) == (
        f"the tracker {name} (run.trackers) needs the package {package}: pip install '.[{name}]' in the folder of "
        "Self-Pruner"
    )
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_named_like_a_package_is_not_the_package(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_package_of_this_name").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(KINDS, "wandb", KINDS["wandb"].__class__(("no_package_of_this_name",)))
    config = write_daemon_settings(tmp_path, http={"enabled": False})
    chosen = ["--set", "run.trackers=[wandb]", "--set", "redis.url=unix:///nowhere"]
    assert "needs the package no_package_of_this_name" in cli.error("daemon", config, *chosen)


def test_a_trackers_process_gets_its_own_keys_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "secret")
    monkeypatch.setenv("SELFPRUNER_HTTP__TOKEN", "secret")
    monkeypatch.setenv("WANDB_MODE", "online")
    secrets = {
        name: {variable for variable, value in environment(name, tmp_path).items() if value == "secret"}
        for name in KINDS
    }
    assert secrets == {
        "tensorboard": set(),
        "mlflow": {"MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY"},
        "wandb": {"WANDB_API_KEY"},
        "trackio": {"HF_TOKEN"},
    }
    assert environment("wandb", tmp_path)["WANDB_MODE"] == "online"


def test_a_candidate_that_failed_is_an_evaluation_without_fitness() -> None:
    population, curves = Population(), Curves(SPEC, PROFILE)
    _uniform, first, second, third = candidates(4)
    population.insert(first, measured(20.0))
    population.insert(second, Failed(reason="timeout"))
    points = list(curves.take(population, {"prompt_tokens": 5.0}))
    assert [point.step for point in points] == [1, 2]
    assert points[0].values["rates/layer 3"] == first.rates[3]
    dense = PROFILE.dense.perplexity
    assert points[1].values == {"best": 20.0, "dense": dense, "llm/prompt_tokens": 5.0, "llm/completion_tokens": 0.0}
    population.insert(third, measured(30.0))
    (point,) = curves.take(population, {})
    assert (point.step, point.values["fitness"], point.values["best"]) == (3, 30.0, 20.0)
    assert "rates/layer 0" not in point.values
