"""`selfpruner worker --config`: the worker of the search that the daemon's settings file names."""

import json
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import main
from gpu_worker.worker.options import WorkerOptions
from protocol.errors import UsageError
from tests.support.cli import Cli

SETTINGS: dict[str, Any] = {
    "search": {"name": "mine"},
    "target": {"model": "m", "rate": 0.3},
    "redis": {"url": "redis://of-the-file:1"},
    "worker": {"lease_seconds": 12.5, "max_evaluation_seconds": 77, "max_preparation_seconds": 99},
    "llm": {"endpoints": [{"base_url": "http://llm/v1", "model": "m", "api_key_file": "/run/secrets/not-for-workers"}]},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "search.yaml"
    path.write_text(json.dumps(SETTINGS))
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[WorkerOptions]:
    """The options of the workers that would run."""
    options: list[WorkerOptions] = []

    async def run_worker(given: WorkerOptions) -> None:
        options.append(given)

    monkeypatch.setattr("gpu_worker.worker.worker.run_worker", run_worker)
    monkeypatch.delenv("SELFPRUNER_REDIS__URL", raising=False)
    return options


def test_the_settings_file_gives_the_search_the_server_and_the_limits(
    config: Path, started: list[WorkerOptions]
) -> None:
    assert main(["worker", "--config", str(config), "--grace-seconds", "3"]) == 0
    (options,) = started
    assert (options.search, options.redis_url, options.grace_seconds) == ("mine", "redis://of-the-file:1", 3)
    assert (options.lease_seconds, options.max_evaluation_seconds, options.max_preparation_seconds) == (12.5, 77, 99)


def test_flags_and_variables_go_before_the_settings_file(
    config: Path, started: list[WorkerOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text("secret\n")
    monkeypatch.setenv("SELFPRUNER_REDIS__URL", "redis://joe@of-the-environment:2")
    monkeypatch.setenv("SELFPRUNER_REDIS__PASSWORD_FILE", str(tmp_path / "password"))
    assert main(["worker", "--config", str(config), "--lease-seconds", "5"]) == 0
    (options,) = started
    assert options.redis_url == "redis://joe:secret@of-the-environment:2"
    assert (options.lease_seconds, options.max_evaluation_seconds) == (5, 77)


def test_a_second_name_for_the_search_is_refused(config: Path, started: list[WorkerOptions], cli: Cli) -> None:
    told = cli.error("worker", "--config", config, "--search", "other")
    assert "give --search or --config, not both" in told
    assert "there is no settings file" in cli.error("worker", "--config", config.with_name("none.yaml"))
    assert not started


def test_without_a_settings_file_nothing_changes(started: list[WorkerOptions]) -> None:
    assert main(["worker", "--search", "given"]) == 0
    (options,) = started
    default = WorkerOptions(redis_url="redis://127.0.0.1:6379", search="given")
    assert options == default


def test_a_worker_that_stays_ends_after_a_while_where_the_cause_may_pass(
    config: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    async def run_worker(_: WorkerOptions) -> None:
        raise UsageError("no GPU is free")

    monkeypatch.setattr("gpu_worker.worker.worker.run_worker", run_worker)
    monkeypatch.setattr("daemon.commands.worker.REST_SECONDS", 0.1)
    code, out, err = cli.run("worker", "--config", config, "--stay")
    assert code == 2 and "invalid_input" in out + err and "no GPU is free" in err
