"""Gives each worker of a machine a different GPU if all workers see all GPUs.

This is for deployments that cannot assign a GPU to each replica, such as Docker Compose. The lock is a file in the
cache that the replicas share. The operating system releases it when the process ends.
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
"""Time limit in seconds for nvidia-smi. If no process uses the driver, nvidia-smi first loads it, which takes many
seconds."""
_QUERY = ("--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits")
_NO_DEVICES = 6
"""Exit code of nvidia-smi when the driver works but finds no GPU. All other codes mean a broken driver."""


async def take_gpu() -> str | None:
    """Reserve the unused GPU with the most free memory, hide all others from this process, and return its UUID.

    Returns None on a machine without a GPU. Raises UsageError when other workers have all GPUs, when the lock files
    cannot be written, and when the driver does not answer. Continuing on the CPU instead would silently take days.
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
        raise UsageError(f"--own-gpu cannot write its lock files to {folder}: {error}") from error
    raise UsageError(f"other workers on this machine use all {len(gpus)} GPUs; start at most one worker per GPU")


def _locked(path: Path) -> bool:
    """Lock the file until this process ends. Return False if another process holds the lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    return True  # the lock lasts while the handle is open


async def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs (of CUDA_VISIBLE_DEVICES if set), sorted by falling free memory.

    Asks nvidia-smi, because torch in this process would allocate memory on every GPU. Raises UsageError if nvidia-smi
    is installed and fails.
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
        raise UsageError(f"--own-gpu: cannot run {program}: {error.strerror}") from error
    try:
        async with asyncio.timeout(QUERY_SECONDS):
            out, err = await process.communicate()
    except TimeoutError:
        raise UsageError(f"--own-gpu: {program} did not answer within {QUERY_SECONDS:g} seconds") from None
    finally:
        if process.returncode is None:
            process.kill()
            with suppress(TimeoutError):  # a hanging driver does not let nvidia-smi end
                async with asyncio.timeout(1):
                    await process.wait()
    text = out.decode(errors="replace")
    if process.returncode in (0, _NO_DEVICES):
        return text if process.returncode == 0 else ""
    said = " ".join((text + err.decode(errors="replace")).split())[:300] or f"exit code {process.returncode}"
    raise UsageError(f"--own-gpu: nvidia-smi fails ({said}); repair the driver, or omit --own-gpu")


def _megabytes(text: str) -> float:
    """Return the free memory; 0 if nvidia-smi prints `[N/A]` (memory shared with the CPU, some virtual GPUs)."""
    try:
        return float(text)
    except ValueError:
        return 0.0
