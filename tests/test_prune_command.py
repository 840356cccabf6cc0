"""`selfpruner prune`: one command from a model to a smaller one that is loaded again and measured."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import main
from daemon.prune_command import prune_settings
from tests.servers import eventually
from tests.tiny_models import save_tiny_folder
from tests.tiny_specs import write_text


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    write_text(folder / "text.txt", words=1600)
    rows = [{"instruction": f"say {i}", "input": "", "output": "abcd efgh " * 3} for i in range(12)]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    return folder


def settings_file(target: Path) -> Path:
    """A search that needs no LLM and takes seconds."""
    settings = {
        "search": {"proposer": "evolution", "population": 4, "mutations": 4, "crossovers": 0, "rounds": 3},
        "target": {"dtype": "float32"},
        "data": {"calibration_windows": 4, "fitness_windows": 3, "report_windows": 2, "seqlen": 32},
        "http": {"enabled": False},
    }
    file = target / "search.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file


def arguments(target: Path, *options: str) -> list[str]:
    data = ["--data", str(target / "text.txt"), "--config", str(settings_file(target))]
    return ["prune", str(target / "model"), "--rate", "0.3", "--out", "small", *data, *options, "--json"]


async def prune(folder: Path, *command: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "daemon",
        *command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )


async def finished(folder: Path, *command: str) -> tuple[int, dict[str, Any], str]:
    process = await prune(folder, *command)
    out, err = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode is not None
    return process.returncode, json.loads(out) if process.returncode == 0 else {}, err.decode()


async def test_a_model_becomes_a_folder_that_measures_what_it_did_in_memory(tmp_path: Path, target: Path) -> None:
    code, answer, err = await finished(
        tmp_path, *arguments(target, "--budget", "8", "--format", "hf", "--format", "gguf")
    )
    assert code == 0, err
    assert answer["evaluations"] == 8
    exported = answer["exported"]
    assert answer["reloaded"] == pytest.approx(exported["perplexity"], rel=1e-3)
    assert exported["perplexity"] <= answer["uniform_perplexity"]
    assert exported["rate"] == pytest.approx(0.3, abs=0.01)
    files = set(os.listdir(tmp_path / "small"))
    assert {"config.json", "model.safetensors", "README.md", "selfpruner.json"} <= files
    assert any(name.endswith(".gguf") for name in files)


async def test_fine_tuning_begins_from_what_was_found_and_writes_the_formats(tmp_path: Path, target: Path) -> None:
    tuning = ["--finetune", "--finetune-data", str(target / "alpaca.json")]
    code, answer, err = await finished(
        tmp_path, *arguments(target, "--budget", "4", *tuning, "--format", "padded", "--format", "gguf")
    )
    assert code == 0, err
    tuned = answer["finetuned"]
    assert tuned["formats"] == ["padded", "gguf"]
    perplexity = tuned["finetuning"]["perplexity"]
    assert perplexity["before"] == pytest.approx(answer["exported"]["perplexity"], rel=1e-3)
    assert answer["reloaded"] == pytest.approx(perplexity["after"], rel=1e-3)
    assert Path(answer["exported"]["folder"]).is_relative_to("runs") or "runs" in answer["exported"]["folder"]


async def test_killed_in_its_search_the_same_command_goes_on(tmp_path: Path, target: Path) -> None:
    command = arguments(target, "--budget", "16")
    process = await prune(tmp_path, *command)

    async def some_are_measured() -> bool:
        files = list(tmp_path.glob("runs/*/evaluations.jsonl"))
        return bool(files) and len(files[0].read_text().splitlines()) >= 5

    await eventually(some_are_measured, seconds=120)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    (file,) = tmp_path.glob("runs/*/evaluations.jsonl")
    before = [json.loads(line)["id"] for line in file.read_text().splitlines() if line.endswith("}")]
    assert not (tmp_path / "small").exists()
    code, answer, err = await finished(tmp_path, *command)
    assert code == 0, err
    assert answer["evaluations"] == 16
    after = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert after[: len(before)] == before and len(set(after)) == len(after), "nothing was measured twice"


def test_the_name_of_the_search_follows_from_the_folder_and_from_what_decides_a_result(target: Path) -> None:
    def name(rate: float, out: str, *overrides: str) -> str:
        file = settings_file(target)
        return prune_settings("m", rate, Path(out), 8, None, None, file, list(overrides)).search.name

    assert name(0.3, "a b/ c d") == name(0.3, "x/-c d")
    assert name(0.3, "small").startswith("prune-small-")
    assert name(0.3, "small") != name(0.4, "small")
    assert name(0.3, "small", "search.name=mine") == "mine"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--format", "gguf", "--finetune"], "give --format hf beside gguf"),
        (["--finetune-data", "x.json"], "are of --finetune, which is missing"),
        (["--finetune", "--finetune-data", "nowhere.json"], "nowhere.json"),
        (["--budget", "2"], "smaller than the first population"),
        (["--set", "search.nonsense=1"], "nonsense"),
        (["--format", "hf", "--format", "padded"], "would write the same files"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_is_begun(
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments(target, *options)) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_taken_is_refused_before_the_search(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    assert main(arguments(target)) == 2
    assert "is no export of Self-Pruner" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
