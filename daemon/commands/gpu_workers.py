"""`selfpruner worker --gpus N`: a worker for each of N GPUs of this machine."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from protocol.errors import SettingsError


def work_on_gpus(count: int, flags: Sequence[str]) -> int:
    """Run `count` workers with `flags`, each on a GPU of its own, until all have ended; return the highest exit code.

    SIGINT and SIGTERM go on to all of them; when this process is killed, they end. A worker that dies is not replaced.
    Raises SettingsError for less than one, and if the machine has fewer GPUs.
    """
    from gpu_worker.worker.gpu_lock import visible_gpus

    if count < 1:
        raise SettingsError(f"--gpus cannot be {count}: give 1 or more")
    there = len(asyncio.run(visible_gpus()))
    if there < count:
        raise SettingsError(f"--gpus {count} is more than the {there} GPUs that this machine shows")
    workers: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        for worker in workers:
            worker.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    wrapper = [sys.executable, "-m", "daemon.local.end_with_parent", str(os.getpid())]
    command = [*wrapper, sys.executable, "-m", "daemon", "worker", "--own-gpu", *flags]
    # In sessions of their own, so that Ctrl-C reaches them once.
    workers.extend(subprocess.Popen(command, start_new_session=True) for _ in range(count))
    return max(_exit_code(worker.wait()) for worker in workers)


def _exit_code(status: int) -> int:
    """Return a process's exit code, as a shell gives it: 128 and the signal's number if a signal ended it."""
    return status if status >= 0 else 128 - status
