"""`selfpruner check` on a real, tiny model: a table, JSON, and exit code 2 with what to put right."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli


@pytest.fixture
def settings(target: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    return {
        "search": {"name": "checked", "population": 4, "rounds": 2},
        "target": {"model": str(target / "model"), "rate": 0.3, "dtype": "float32"},
        "data": {
            "calibration": str(target / "calibration.txt"),
            "calibration_windows": 4,
            "fitness": str(target / "data.txt"),
            "fitness_windows": 2,
            "seqlen": 32,
        },
        "run": {"folder": str(tmp_path / "runs")},
    }


def written(settings: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "search.yaml"
    file.write_text(json.dumps(settings))
    return file


def test_a_search_that_can_run_is_estimated(cli: Cli, settings: dict[str, Any], tmp_path: Path) -> None:
    config = written(settings, tmp_path)
    found = cli.answer("check", config, "--no-ask")
    assert found["ok"] and found["device"].startswith("this CPU")
    assert {each["what"]: each["state"] for each in found["findings"]} == {
        "files": "ok", "model": "ok", "texts": "ok", "memory": "ok", "disk": "ok", "LLM": "warning",
    }  # fmt: skip
    assert 0 < found["cost"]["hours"]["least"] <= found["cost"]["hours"]["expected"] < 1
    code, table, _ = cli.run("check", config, "--no-ask", "--gpu", "h100")
    assert code == 0 and "that the data sheet of H100 states" in table
    assert not (tmp_path / "runs").exists()


def test_the_rate_that_a_size_needs_is_said(cli: Cli, settings: dict[str, Any], tmp_path: Path) -> None:
    del settings["target"]["rate"]
    settings["target"]["parameters"] = 25_000
    found = cli.answer("check", written(settings, tmp_path), "--no-ask")
    (model,) = (each for each in found["findings"] if each["what"] == "model")
    assert "25,000 parameters need a rate of 0." in model["says"]


def test_texts_that_are_too_short_are_refused_with_the_table(
    cli: Cli, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["data"]["fitness_windows"] = 200  # more than its bytes can have, if not than twice as many
    code, table, err = cli.run("check", written(settings, tmp_path), "--no-ask")
    assert code == 2 and "is too short" in table
    assert err.splitlines()[-1].endswith("put this right before the search: texts")


def test_a_gated_model_that_cannot_be_reached_is_estimated_from_its_published_sizes(
    cli: Cli, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_worker.models.loading.hub_reachable", lambda: False)
    settings["target"] |= {"model": "meta-llama/Llama-2-7b-hf", "dtype": "bfloat16"}
    code, out, _ = cli.run("check", written(settings, tmp_path), "--no-ask", "--gpu", "a100", "--json")
    found = json.loads(out)
    assert code == 2 and not found["ok"] and "13.5 GB for weights" in str(found["findings"])
    assert found["cost"]["hours"]["expected"] > 0


def test_a_model_too_large_for_a_gpu_is_refused(
    cli: Cli, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_worker.models.loading.hub_reachable", lambda: False)
    settings["target"] |= {"model": "meta-llama/Meta-Llama-3-70B", "dtype": "bfloat16"}
    config = written(settings, tmp_path)

    def memory(*more: str) -> str:
        _, out, _ = cli.run("check", config, "--no-ask", "--json", *more)
        (found,) = (each for each in json.loads(out)["findings"] if each["what"] == "memory")
        return f"{found['state']}: {found['says']}"

    assert memory("--gpu", "h100").startswith("error: the model is too large")
    assert "spread over 2 GPUs" in memory("--gpu", "h100", "--gpus", "2")


def test_an_unknown_gpu_is_refused_at_once(cli: Cli, settings: dict[str, Any], tmp_path: Path) -> None:
    assert "--gpu cannot be 'h9': it is one of" in cli.error("check", written(settings, tmp_path), "--gpu", "h9")
