"""One GPU for each worker of a machine: several workers that see all GPUs each take another one.

For deployments that cannot give every replica a GPU of its own, as Docker Compose cannot. The lock is a file in the
cache, which replicas share; it ends with the process, however that ends.
"""

import asyncio
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from gpu_worker.cache import cache_dir
from protocol.errors import UsageError

QUERY_SECONDS = 60.0
"""How long nvidia-smi may take. Where no process holds the driver it loads it first, which takes many seconds."""
_QUERY = ("--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits")
_NO_DEVICES = 6
"""The exit code of nvidia-smi where the driver answers and has no GPU. All others are of a driver that is broken."""


async def take_gpu() -> str | None:
    """Make the free GPU with most free memory the only one that this process and its children see; returns its UUID.

    None where the machine has no GPU. Raises UsageError where other workers have taken all of them, where the driver
    does not answer (to go on without GPUs would take days and say nothing), and where no lock can be kept.
    """
    gpus = await visible_gpus()
    return await asyncio.to_thread(_lock_first, gpus) if gpus else None


def _lock_first(gpus: list[str]) -> str:
    folder = cache_dir() / "gpus"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for gpu in gpus:
            if _locked(folder / gpu):
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
                return gpu
    except OSError as error:
        raise UsageError(f"--own-gpu keeps its locks in {folder}, which cannot be used: {error}") from error
    raise UsageError(f"all {len(gpus)} GPUs are taken by other workers of this machine; start no more than that")


def _locked(path: Path) -> bool:
    """Lock the file until this process ends, unless another process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    return True  # the handle stays open, and with it the lock


async def visible_gpus() -> list[str]:
    """The UUIDs of the machine's GPUs, the one with most free memory first; those of CUDA_VISIBLE_DEVICES if it is set.

    Asks nvidia-smi: torch would take memory on every GPU in this process, which is to hold no model. Raises UsageError
    where there is that program and it fails.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    rows = [line.split(", ") for line in (await _asked(program)).splitlines() if line.startswith("GPU-")]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        rows = [row for i, row in enumerate(rows) if {str(i), row[0]} & set(wanted.split(","))]
    return [row[0] for row in sorted(rows, key=lambda row: _megabytes(row[-1]), reverse=True)]


async def _asked(program: str) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            program, *_QUERY, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except OSError as error:
        raise UsageError(f"--own-gpu: {program} cannot be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(QUERY_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        raise UsageError(f"--own-gpu: {program} has not answered in {QUERY_SECONDS:g} seconds") from None
    finally:
        if process.returncode is None:
            process.kill()
            with suppress(TimeoutError):  # a driver that hangs does not let it end
                async with asyncio.timeout(1):
                    await process.wait()
    text = out.decode(errors="replace")
    if process.returncode in (0, _NO_DEVICES):
        return text if process.returncode == 0 else ""
    said = " ".join((text + err.decode(errors="replace")).split())[:300] or f"exit code {process.returncode}"
    raise UsageError(f"--own-gpu: nvidia-smi fails ({said}): mend the driver, or leave the flag out")


def _megabytes(text: str) -> float:
    """Free memory; 0 where nvidia-smi does not know it (`[N/A]`: memory that the CPU shares, some virtual GPUs)."""
    try:
        return float(text)
    except ValueError:
        return 0.0
