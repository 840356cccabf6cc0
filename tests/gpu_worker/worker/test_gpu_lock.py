"""Workers of one machine that see all GPUs take one each."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gpu_worker.worker import gpu_lock as own_gpu
from gpu_worker.worker.gpu_lock import take_gpu, visible_gpus
from protocol.errors import UsageError
from tests.support.cli import Cli
from tests.support.root import ROOT
from tests.support.servers import Server, eventually

THREE = "GPU-a, 1000\\nGPU-b, 80000\\nGPU-c, 2000\\n"


def does(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands in its place in PATH; at first it lists three GPUs, the second with most free memory."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    does(program, f"printf '{THREE}'")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


@pytest.fixture(autouse=True)
def _a_machine(nvidia_smi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those GPUs, and a cache of our own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def another_worker() -> "subprocess.Popen[str]":
    """A process that takes a GPU, says which, and keeps it until it is killed."""
    code = "import asyncio, time; from gpu_worker.worker.gpu_lock import take_gpu; "
    code += "print(asyncio.run(take_gpu()), flush=True); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)


async def test_each_worker_takes_another_gpu_until_none_is_left_and_a_dead_one_gives_its_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = [another_worker() for _ in range(3)]
    try:
        taken = [worker.stdout.readline().strip() for worker in workers if worker.stdout]
        assert sorted(taken) == ["GPU-a", "GPU-b", "GPU-c"]
        with pytest.raises(UsageError, match="other workers on this machine use all 3 GPUs"):
            await take_gpu()
        workers[1].kill()
        workers[1].wait()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
        assert await take_gpu() == taken[1]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == taken[1]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


@pytest.mark.one_server
def test_one_command_starts_a_worker_on_each_gpu_and_a_signal_ends_them_all(server: Server) -> None:
    command = [sys.executable, "-m", "daemon", "worker", "--gpus", "2", "--redis-url", server.url, "--search", "none"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    lines = [json.loads(started.stdout.readline()) for _ in range(4)]
    assert sorted(line["gpu"] for line in lines if line["event"] == "gpu_taken") == ["GPU-b", "GPU-c"]
    assert sum(line["event"] == "waiting_for_search" for line in lines) == 2
    workers = psutil.Process(started.pid).children()
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=30)
    assert started.returncode == 0 and not any(worker.is_running() for worker in workers)


@pytest.mark.one_server
def test_workers_on_gpus_give_their_worst_exit_code(server: Server, nvidia_smi: Path, cli: Cli) -> None:
    assert cli.error("worker", "--gpus", 4) == "--gpus 4 is more than the 3 GPUs that this machine shows"
    assert "--gpus cannot be 0" in cli.error("worker", "--gpus", 0)
    another = another_worker()
    assert another.stdout is not None and another.stdout.readline()
    flags = ["--redis-url", server.url, "--search", "none", "--idle-seconds", "0"]
    assert cli.run("worker", "--gpus", 2, *flags)[0] == 0
    assert cli.run("worker", "--gpus", 3, *flags)[0] == 2  # the other worker has one of the three
    another.kill()
    another.communicate()


async def test_the_gpu_with_most_free_memory_comes_first(nvidia_smi: Path) -> None:
    """And one whose free memory is unknown comes last."""
    assert await visible_gpus() == ["GPU-b", "GPU-c", "GPU-a"]
    does(nvidia_smi, "printf 'GPU-a, [N/A]\\nGPU-b, 5\\nGPU-c, [Not Supported]\\n'")
    assert await visible_gpus() == ["GPU-b", "GPU-a", "GPU-c"]


@pytest.mark.parametrize(("wanted", "seen"), [("0,2", ["GPU-c", "GPU-a"]), ("GPU-c", ["GPU-c"]), ("", [])])
async def test_gpus_that_are_hidden_are_not_taken(
    wanted: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
    assert await visible_gpus() == seen


async def test_a_machine_without_gpus_has_none_to_take(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    does(nvidia_smi, "echo No devices were found; exit 6")
    assert await take_gpu() is None
    monkeypatch.setenv("PATH", "")
    assert await take_gpu() is None


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "version mismatch.*driver"),
        ("echo 'could not communicate with the NVIDIA driver' >&2; exit 9", "could not communicate"),
        ("exit 255", "exit code 255"),
    ],
)
async def test_a_driver_that_does_not_answer_is_no_machine_without_gpus(
    nvidia_smi: Path, script: str, sentence: str
) -> None:
    does(nvidia_smi, script)
    with pytest.raises(UsageError, match=sentence):
        await take_gpu()


async def test_a_driver_that_hangs_is_not_waited_for_and_leaves_the_loop_alone(
    nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_gpu, "QUERY_SECONDS", 0.5)
    does(nvidia_smi, "exec sleep 600.25")
    taking = asyncio.create_task(take_gpu())
    await asyncio.sleep(0)  # the loop is free while it is asked
    assert not taking.done()
    with pytest.raises(UsageError, match="did not answer within"):
        await taking
    await eventually(lambda: all(p.info["cmdline"] != ["sleep", "600.25"] for p in psutil.process_iter(["cmdline"])))


def test_locks_that_cannot_be_kept_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(UsageError, match=r"cannot write its lock files to .*cache"):
        asyncio.run(take_gpu())
