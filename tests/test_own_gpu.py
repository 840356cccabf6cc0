"""Workers of one machine that see all GPUs take one each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_worker.own_gpu import take_gpu, visible_gpus
from protocol.errors import UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in place of nvidia-smi: three GPUs, the second with most free memory; and a cache of our own."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'GPU-a, 1000\\nGPU-b, 80000\\nGPU-c, 2000\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def another_worker() -> "subprocess.Popen[str]":
    """A process that takes a GPU, says which, and keeps it until it is killed."""
    code = "import time; from gpu_worker.own_gpu import take_gpu; print(take_gpu(), flush=True); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_each_worker_takes_another_gpu_until_none_is_left_and_a_dead_one_gives_its_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = [another_worker() for _ in range(3)]
    try:
        taken = [worker.stdout.readline().strip() for worker in workers if worker.stdout]
        assert sorted(taken) == ["GPU-a", "GPU-b", "GPU-c"]
        with pytest.raises(UsageError, match="all 3 GPUs are taken"):
            take_gpu()
        workers[1].kill()
        workers[1].wait()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
        assert take_gpu() == taken[1]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == taken[1]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_the_gpu_with_most_free_memory_comes_first() -> None:
    assert visible_gpus() == ["GPU-b", "GPU-c", "GPU-a"]


@pytest.mark.parametrize(("wanted", "seen"), [("0,2", ["GPU-c", "GPU-a"]), ("GPU-c", ["GPU-c"]), ("", [])])
def test_gpus_that_are_hidden_are_not_taken(wanted: str, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
    assert visible_gpus() == seen


def test_a_machine_without_gpus_has_none_to_take(tmp_path: Path) -> None:
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho no devices >&2; exit 9\n")
    assert take_gpu() is None
