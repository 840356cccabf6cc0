"""A model is pruned for a task of one's own: searched on answers, exported, measured again and fine-tuned on them."""

import json
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.tiny_models import save_tiny_folder
from tests.support.tiny_specs import write_text


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], restored_logs: None) -> Cli:
    return Cli(capfd)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of seconds whose fitness is a file of examples, which the test makes itself."""
    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    rows = [
        {"prompt": f"ticket {i}: it is {'broken' if i % 3 else 'slow'}.", "completion": " we fix it"} for i in range(40)
    ]
    (folder / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {
        "search": {"name": "s", "fitness": "kl", "proposer": "evolution", "population": 4, "mutations": 4, "rounds": 2},
        "target": {"model": str(folder / "model"), "rate": 0.3, "dtype": "float32"},
        "data": {
            "fitness": str(folder / "tickets.jsonl"),
            "fitness_windows": 12,
            "calibration": write_text(folder / "text.txt"),
            "calibration_windows": 4,
            "report": str(folder / "tickets.jsonl"),
            "seqlen": 64,
        },
        "worker": {"lease_seconds": 2},
    }
    chosen["search"] |= {"crossovers": 0, "first_windows": 4}  # type: ignore[operator]
    (folder / "search.json").write_text(json.dumps(chosen))
    return folder / "search.json"


def test_a_model_is_pruned_for_answers(config: Path, tmp_path: Path, cli: Cli) -> None:
    told = cli.answer("run", config, "--set", f"run.folder={tmp_path}")
    answers = 12 * (len(" we fix it") + 1)  # one token per byte, and the end of the text
    assert told["best"]["tokens"] == told["dense"]["tokens"] == answers
    assert told["best"]["report_tokens"] == 28 * (len(" we fix it") + 1), "all examples that are left"
    out = tmp_path / "small"
    code, table, error = cli.run("export", "--search", "s", "--folder", tmp_path, "--out", out)
    assert code == 0, error
    assert f"measured on the answers of tickets.jsonl: {answers} tokens predicted" in table
    card = (out / "README.md").read_text()
    assert "| tickets.jsonl (fitness, answers only) |" in card and "(report, answers only)" in card
    texts = ["--data", config.parent / "tickets.jsonl", "--report-data", config.parent / "tickets.jsonl"]
    again = cli.answer("evaluate", out, *texts)
    assert again["perplexity"] == pytest.approx(told["best"]["perplexity"], rel=1e-5)
    assert again["report_perplexity"] == pytest.approx(told["best"]["report_perplexity"], rel=1e-5)

    learn = ["--data", config.parent / "tickets.jsonl", "--batch", 4, "--seqlen", 64, "--learning-rate", 0.01]
    tuned = cli.answer("finetune", out, "--out", tmp_path / "tuned", *learn, "--distil", config.parent / "model")
    assert tuned["finetuning"]["form"] == "alpaca" and tuned["finetuning"]["teacher"] == "model"
    assert tuned["finetuning"]["last_loss"] < tuned["finetuning"]["first_loss"]


def test_what_holds_no_answers_is_refused_before_the_model_is_loaded(config: Path, tmp_path: Path, cli: Cli) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n')
    told = cli.error("run", config, "--set", f"run.folder={tmp_path}", "--set", f"data.fitness={bad}")
    assert "line 1 of" in told and "has no 'completion'" in told
    assert not (tmp_path / "s").exists()
    told = cli.error("finetune", tmp_path, "--out", tmp_path / "x", "--data", bad, "--distil", tmp_path / "nothing")
    assert "nothing" in told
