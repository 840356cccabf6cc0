"""One GPU for each worker of a machine: several workers that see all GPUs each take another one.

For deployments that cannot give every replica a GPU of its own, as Docker Compose cannot. The lock is a file in the
cache, which replicas share; it ends with the process, however that ends.
"""

import fcntl
import os
import shutil
import subprocess

from gpu_worker.cache import cache_dir
from protocol.errors import UsageError

_QUERY = ("--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits")


def take_gpu() -> str | None:
    """Make the free GPU with most free memory the only one that this process and its children see; returns its UUID.

    None where the machine has no GPU. Raises UsageError where other workers have taken all of them.
    """
    gpus = visible_gpus()
    folder = cache_dir() / "gpus"
    folder.mkdir(parents=True, exist_ok=True)
    for gpu in gpus:
        handle = os.open(folder / gpu, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            continue
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        return gpu  # the handle stays open, and with it the lock, until the process ends
    if gpus:
        raise UsageError(f"all {len(gpus)} GPUs are taken by other workers of this machine; start no more than that")
    return None


def visible_gpus() -> list[str]:
    """The UUIDs of the machine's GPUs, the one with most free memory first; those of CUDA_VISIBLE_DEVICES if it is set.

    Asks nvidia-smi: torch would take memory on every GPU in this process, which is to hold no model.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run([program, *_QUERY], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines() if line]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        rows = [row for i, row in enumerate(rows) if {str(i), row[0]} & set(wanted.split(","))]
    return [gpu for gpu, _ in sorted(rows, key=lambda row: float(row[1]), reverse=True)]
