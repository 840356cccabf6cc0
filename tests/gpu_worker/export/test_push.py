"""Exported folders on a substitute for the Hugging Face Hub."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.cli import Cli
from tests.support.hub import TOKEN, Hub, running_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def exported(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small export with figures on two texts."""
    from daemon.cli import main

    out = tmp_path_factory.mktemp("exports") / "small"
    command = ["export", "--model", target / "model", "--allocate", "uniform", "--rate", 0.3, "--out", out]
    command += ["--data", target / "data.txt", "--calibration-data", target / "calibration.txt", "--windows", 2]
    command += ["--seqlen", 32, "--calibration-windows", 2, "--dtype", "float32"]
    assert main([str(each) for each in command]) == 0
    return out


def on(hub: Hub, token: str | None = TOKEN) -> dict[str, str]:
    """The environment of a process that uses `hub`."""
    changed = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nonexistent"}
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")} | changed
    return environment if token is None else environment | {"HF_TOKEN": token}


def pushed(hub: Hub, *arguments: object, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run the command; the hub's address is read when its library is imported."""
    command = [sys.executable, "-m", "daemon", "push", *map(str, arguments)]
    return subprocess.run(command, env=on(hub, token), capture_output=True, text=True, timeout=120, check=False)


def test_a_folder_is_uploaded_whole_to_a_private_repository(hub: Hub, exported: Path) -> None:
    done = pushed(hub, exported, "me/small-model", "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/small-model" in done.stdout and "private" in done.stdout
    assert hub.private == {"me/small-model": True}
    files = hub.files["me/small-model"]
    assert set(files) == {path.name for path in exported.iterdir()}
    assert all(files[path.name] == path.read_bytes() for path in exported.iterdir() if path.name != "README.md")
    card = files["README.md"].decode()
    data: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    assert data["license"] == "apache-2.0" and data["pipeline_tag"] == "text-generation"
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"][0]["type"] == "perplexity" and result["dataset"]["name"] == "data.txt (fitness text)"
    assert 'from_pretrained("me/small-model"' in card
    assert str(exported.parent) not in card


def test_a_program_pushes_as_the_command_does(hub: Hub, exported: Path) -> None:
    program = f"import selfpruner; print(selfpruner.push({str(exported)!r}, 'me/by-program').url)"
    done = subprocess.run([sys.executable, "-c", program], env=on(hub), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{hub.url}/me/by-program" and hub.private == {"me/by-program": True}


def test_a_second_push_changes_what_is_there_and_public_is_asked_for(hub: Hub, exported: Path) -> None:
    assert pushed(hub, exported, "me/open", "--public").returncode == 0
    assert hub.private == {"me/open": False}
    assert pushed(hub, exported, "me/open", "--json").returncode == 0


@pytest.mark.parametrize(
    ("repository", "token", "code", "sentence"),
    [
        ("no-user", TOKEN, 2, "is not a repository's name: give USER/NAME"),
        ("me/small", None, 2, "there is no Hugging Face token"),
        ("me/small", "hf_wrong", 1, "the Hugging Face Hub refuses me/small"),
        ("another/small", TOKEN, 1, "the Hugging Face Hub refuses another/small"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: Hub, exported: Path, repository: str, token: str | None, code: int, sentence: str
) -> None:
    done = pushed(hub, exported, repository, token=token)
    assert (done.returncode, sentence in done.stderr) == (code, True), done.stderr
    assert done.stderr.count("\n") == 1 and not hub.files


def test_a_hub_that_cannot_be_reached_is_one_sentence(exported: Path) -> None:
    nowhere = Hub()
    nowhere.url = "http://127.0.0.1:1"
    done = pushed(nowhere, exported, "me/small")
    assert done.returncode == 1 and "the Hugging Face Hub cannot be reached" in done.stderr, done.stderr


def test_a_folder_that_is_no_export_is_refused(cli: Cli, tmp_path: Path) -> None:
    assert "was not written by `selfpruner export`" in cli.error("push", tmp_path, "me/small")
