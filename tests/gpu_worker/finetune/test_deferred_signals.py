"""Signals that come while native code writes: they wait, and what is written is whole."""

import itertools
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from gpu_worker.finetune.checkpoint import Checkpoint, State
from gpu_worker.finetune.trainable import Trained
from gpu_worker.finetune.training import Limits
from protocol.results.finetuning import LossPoint
from protocol.runtime.signals import Interrupted, defer_signals, interruptible
from tests.support.finetunes import QUICK, exported, finetuned
from tests.support.root import ROOT

KEPT = State(
    masters=[torch.arange(1000.0)],
    optimizer={},
    losses=(LossPoint(step=1, loss=2.0, learning_rate=0.1, tokens=3, seconds=4.0),),
)


class Interrupting:
    """A file in whose first write a signal comes."""

    def __init__(self, file: IO[bytes], number: int) -> None:
        self._file, self._number, self._sent = file, number, False

    def write(self, content: bytes) -> int:
        if not self._sent:
            self._sent = True
            signal.raise_signal(self._number)
        return self._file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_checkpoint_that_a_signal_comes_to_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, Interrupting(file, number)))
    checkpoint = Checkpoint(tmp_path / "checkpoint", {})
    with pytest.raises(Interrupted) as raised, interruptible():
        checkpoint.write(KEPT)
    assert raised.value.exit_code == 128 + number
    read = checkpoint.read()
    assert read is not None and read.losses == KEPT.losses and torch.equal(read.masters[0], KEPT.masters[0])
    assert [file.name for file in checkpoint.folder.iterdir()] == ["checkpoint.pt"]


def interrupted_training(folder: Path, **changes: Any) -> int:
    """Fine-tune until a signal; returns how many steps were kept."""
    with pytest.raises(Interrupted), interruptible():
        finetuned(exported(folder / "pruned"), folder / "out", QUICK, **changes)
    kept = torch.load(folder / "out.checkpoint" / "checkpoint.pt", weights_only=True)
    return len(kept["state"]["losses"])


def test_a_step_that_a_signal_comes_to_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_back, calls = Trained.write_back, itertools.count(1)

    def signalled(trained: Trained) -> None:
        if next(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        write_back(trained)

    monkeypatch.setattr(Trained, "write_back", signalled)
    assert interrupted_training(tmp_path) == 5


def test_half_a_step_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(_: Trained) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trained, "write_back", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        finetuned(exported(tmp_path / "pruned"), tmp_path / "out", QUICK)
    assert not (tmp_path / "out.checkpoint").exists()


def test_what_a_signal_comes_to_is_not_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, written = torch.save, []

    def signalled(content: object, file: IO[bytes]) -> None:
        written.append(file)
        save(content, Interrupting(file, signal.SIGTERM))

    monkeypatch.setattr(torch, "save", signalled)
    assert interrupted_training(tmp_path, limits=Limits(checkpoint_seconds=0.0)) == 1
    assert len(written) == 1


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = """
import signal
from protocol.runtime.signals import defer_signals
with defer_signals():
    signal.raise_signal(signal.SIGTERM)
    print("still here", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("no more", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "still here\n")


def test_other_threads_have_nothing_to_hold_back() -> None:
    """In the main thread the handlers are restored."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with defer_signals():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    entered: list[bool] = []

    def work() -> None:
        with defer_signals():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]
