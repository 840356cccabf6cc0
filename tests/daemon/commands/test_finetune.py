"""`selfpruner finetune`: what it refuses, and that a run which is killed ends as one that is not."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from daemon.cli import main
from gpu_worker.finetune import checkpoint as checkpoint_module
from protocol.runtime.locks import try_lock
from tests.support.cli import Cli
from tests.support.finetunes import exported, other_text_in, text_in
from tests.support.root import ROOT

STEPS = ["--max-steps", "20", "--epochs", "20", "--batch", "4", "--seqlen", "32", "--learning-rate", "0.01"]


ENDED_IN_TRAINING = """
import os, sys
from daemon.cli import main
from gpu_worker.finetune import training

step = training._Run.step

def ended(run):
    step(run)
    if len(run.losses) == 10:
        os.kill(os.getpid(), int(sys.argv[1]))

training._Run.step = ended
sys.exit(main(sys.argv[2:]))
"""
"""Sends itself a signal after the tenth step, however fast the machine is."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("exported") / "pruned")


def arguments(folder: Path, out: Path, *options: str) -> list[str]:
    return ["finetune", str(folder), "--data", text_in(folder.parent), "--out", str(out), *STEPS, *options]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """With as many threads as its other processes, this one computes the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("ending", "options"), [(signal.SIGKILL, []), (signal.SIGTERM, ["--full"])], ids=["SIGKILL-lora", "SIGTERM-full"]
)
def test_what_was_killed_ends_with_the_same_weights(
    folder: Path, tmp_path: Path, cli: Cli, ending: signal.Signals, options: list[str]
) -> None:
    command = arguments(folder, tmp_path / "killed", *options, "--checkpoint-minutes", "0")
    first = subprocess.run(
        [sys.executable, "-c", ENDED_IN_TRAINING, str(int(ending)), *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert not (tmp_path / "killed").exists()
    if ending == signal.SIGTERM:
        assert first.returncode == 143 and "run the same command again to resume" in first.stderr.splitlines()[-1]
    else:
        assert first.returncode == -signal.SIGKILL, first.stderr
    # After a kill without warning the step that it came to is made again.
    assert cli.answer(*command)["resumed_from"] == (10 if ending == signal.SIGTERM else 9)
    assert not (tmp_path / "killed.checkpoint").exists()
    cli.answer(*arguments(folder, tmp_path / "undisturbed", *options))
    one, other = (tmp_path / name for name in ("killed", "undisturbed"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    losses = [json.loads((out / "finetune.json").read_text())["losses"] for out in (one, other)]
    assert [point["loss"] for point in losses[0]] == [point["loss"] for point in losses[1]]


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that a run leaves after its last step."""
    out = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint_module.Checkpoint, "remove", lambda _: None)
        assert main(arguments(folder, out)) == 0
    return checkpoint_module.folder_beside(out)


@pytest.fixture
def interrupted(checkpoint: Path, tmp_path: Path) -> Path:
    """An output of which there is a checkpoint after some steps and nothing else."""
    shutil.copytree(checkpoint, checkpoint_module.folder_beside(tmp_path / "out"))
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--learning-rate", "0.02"], "another learning_rate (0.01, not 0.02)"),
        (["--full"], "another method ('lora', not 'full')"),
        (["--seed", "1"], "another seed"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    folder: Path, interrupted: Path, cli: Cli, options: list[str], sentence: str
) -> None:
    assert sentence in cli.error(*arguments(folder, interrupted, *options))
    assert not interrupted.exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, interrupted: Path, cli: Cli) -> None:
    assert "another model" in cli.error(*arguments(exported(tmp_path / "other", seed=1), interrupted))


def test_a_checkpoint_that_is_torn_is_named(folder: Path, interrupted: Path, cli: Cli) -> None:
    file = checkpoint_module.folder_beside(interrupted) / checkpoint_module.FILE
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be read" in cli.error(*arguments(folder, interrupted))


def test_a_run_that_had_ended_is_only_written(folder: Path, interrupted: Path, cli: Cli) -> None:
    answer = cli.answer(*arguments(folder, interrupted))
    assert answer["resumed_from"] == answer["finetuning"]["steps"] == 20


def test_time_ends_it_after_a_step_at_least(folder: Path, tmp_path: Path, cli: Cli) -> None:
    answer = cli.answer(*arguments(folder, tmp_path / "out", "--max-minutes", "0.0001"))
    assert answer["ended_by"] == "time" and 1 <= answer["finetuning"]["steps"] < 20


def test_its_folder_is_measured_again_by_its_card(folder: Path, tmp_path: Path, cli: Cli) -> None:
    text = other_text_in(tmp_path)
    perplexity = cli.answer(*arguments(folder, tmp_path / "out", "--eval-data", text))["finetuning"]["perplexity"]
    again = cli.answer("evaluate", tmp_path / "out", "--data", text)
    assert again["card_perplexity"] == pytest.approx(perplexity["after"])
    assert again["perplexity"] == pytest.approx(perplexity["after"], rel=1e-4)
    assert perplexity["after"] < perplexity["before"]


def test_people_get_a_table(folder: Path, tmp_path: Path, cli: Cli) -> None:
    code, told, _ = cli.run(
        *arguments(folder, tmp_path / "out", "--max-steps", "2", "--eval-data", other_text_in(tmp_path))
    )
    assert code == 0 and "LoRA, r 8" in told and "perplexity" in told and "2 steps" in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rank", "0"], "rank cannot be"),
        (["--full", "--rank", "8"], "--rank has no effect here"),
        (["--format", "onnx"], "onnx"),
        (["--max-minutes", "0"], "--max-minutes"),
        (["--eval-windows", "3"], "--eval-data"),
        (["--data", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["--data", "self"], "there is no file 'self'"),
        (["--eval-data", "nowhere.txt"], "there is no file 'nowhere.txt'"),
        (["--seqlen", "2048"], "longer than the 256 positions"),
        (["--dtype", "float16"], "float16"),
        (["--format", "gguf", "--gguf-type", "q9"], "q9"),
        (["--gguf-type", "q8_0"], "--gguf-type q8_0 has no effect here: hf has no GGUF file; add --format gguf"),
    ],
)
def test_what_cannot_be_done_gets_one_sentence(
    folder: Path, tmp_path: Path, cli: Cli, options: list[str], sentence: str
) -> None:
    assert sentence in cli.error(*arguments(folder, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_the_folder_that_is_trained_from_is_not_replaced(folder: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "link").symlink_to(folder)
    before = sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir())
    for out in (folder, tmp_path / "link"):
        assert "is the folder to train from" in cli.error(*arguments(folder, out, "--force"))
    assert sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir()) == before


def test_a_file_is_not_learned_from_and_measured_on(folder: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "link.txt").symlink_to(text_in(folder.parent))
    code, _, err = cli.run(*arguments(folder, tmp_path / "out", "--eval-data", str(tmp_path / "link.txt")))
    assert code == 2 and "--data and --eval-data are the same file" in err and err.count("\n") == 1


def test_a_file_where_checkpoints_go_is_one_sentence(folder: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "out.checkpoint").touch()
    assert "the checkpoint folder, is a file" in cli.error(*arguments(folder, tmp_path / "out"))


def test_a_second_process_that_fine_tunes_into_the_folder_is_refused(folder: Path, tmp_path: Path, cli: Cli) -> None:
    with checkpoint_module.locked(tmp_path / "out.checkpoint"):
        assert "that fine-tunes into the same --out" in cli.error(*arguments(folder, tmp_path / "out"))
        assert [file.name for file in (tmp_path / "out.checkpoint").iterdir()] == [checkpoint_module.LOCK]
    assert list(tmp_path.iterdir()) == []


def test_it_is_held_from_its_reading_to_its_removal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "out.checkpoint" / checkpoint_module.LOCK
    seen: list[str] = []

    def noted(name: str) -> None:
        whole = getattr(checkpoint_module.Checkpoint, name)

        def look(checkpoint: checkpoint_module.Checkpoint, *given: object) -> object:
            assert try_lock(lock) is None
            seen.append(name)
            return whole(checkpoint, *given)

        monkeypatch.setattr(checkpoint_module.Checkpoint, name, look)

    for name in ("read", "write", "remove"):
        noted(name)
    assert main(arguments(folder, tmp_path / "out")) == 0
    assert (seen[0], seen[-1]) == ("read", "remove") and "write" in seen
    assert not lock.parent.exists()


def test_a_bad_line_is_named_before_the_model_is_loaded(folder: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    code, _, err = cli.run("finetune", folder, "--data", tmp_path / "a.jsonl", "--out", tmp_path / "out")
    assert code == 2 and "line 2 of" in err.splitlines()[-1] and "loading model" not in err


def test_without_peft_the_pip_line_is_said(
    folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("daemon.settings.packages.find_spec", lambda name: None if name == "peft" else find(name))
    assert "pip install '.[finetune]'" in cli.error(*arguments(folder, tmp_path / "out"))
    cli.answer(*arguments(folder, tmp_path / "out", "--full"))


def test_a_full_disk_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert "of disk where" in cli.error(*arguments(folder, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_instructions_are_learned_and_what_lies_beside_a_checkpoint_stays(
    folder: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"Say {word}.", "output": word * 5} for word in ("la", "li", "lo", "lu")]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "out.checkpoint").mkdir()
    (tmp_path / "out.checkpoint" / "notes.txt").write_text("mine")
    monkeypatch.setattr("gpu_worker.finetune.output.find_spec", lambda _: None)  # no matplotlib
    options = ["--data", str(tmp_path / "rows.jsonl"), "--seqlen", "240"]
    tuned = cli.answer(*arguments(folder, tmp_path / "out", *options))["finetuning"]
    assert (tuned["form"], tuned["examples"], tuned["data"]) == ("alpaca", 4, "rows.jsonl")
    assert tuned["last_loss"] < tuned["first_loss"]
    assert not (tmp_path / "out" / "loss.png").exists()
    assert [file.name for file in (tmp_path / "out.checkpoint").iterdir()] == ["notes.txt"]
