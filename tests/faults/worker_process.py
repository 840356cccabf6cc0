"""A real worker with a fake evaluation process: `python -m tests.faults.worker_process JSON`.

The JSON has WorkerOptions, `crash_at` and `unkillable`.

`crash_at` ends it as SIGKILL would, at its first pass: `claimed` (it has a job), `measured` (it has an outcome, not
committed), `committed`. With `unkillable` its evaluation process is one that no kill ends, as the worker sees it.
"""

import asyncio
import json
import os
import signal
import sys
from typing import Any

from gpu_worker.worker import evaluator as child_module
from gpu_worker.worker import worker as worker_module
from gpu_worker.worker.evaluator import EvaluationChild
from gpu_worker.worker.options import WorkerOptions
from gpu_worker.worker.worker import run_worker
from protocol.errors import SelfPrunerError, UsageError
from protocol.plans.candidate import Outcome
from protocol.queue.jobs import Job, JobQueue
from protocol.runtime import logs


async def _never(_child: EvaluationChild, _process: asyncio.subprocess.Process) -> None:
    await asyncio.Event().wait()


class CrashingQueue(JobQueue):
    """Ends the process at one step."""

    crash_at = ""

    async def claim(self) -> Job | None:
        job = await super().claim()
        if job:
            self._crash("claimed")
        return job

    async def commit(self, job: Job, outcome: Outcome) -> bool:
        self._crash("measured")
        first = await super().commit(job, outcome)
        self._crash("committed")
        return first

    def _crash(self, point: str) -> None:
        if point == self.crash_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    options: dict[str, Any] = json.loads(sys.argv[1])
    CrashingQueue.crash_at = options.pop("crash_at", "")
    if options.pop("unkillable", False):
        setattr(child_module, "KILL_SECONDS", 0.5)  # noqa: B010
        setattr(EvaluationChild, "_gone", _never)  # noqa: B010  (a driver cannot be made to hang)
    setattr(worker_module, "JobQueue", CrashingQueue)  # noqa: B010  (the worker makes its own queue)
    logs.configure(json_lines=True)
    options["evaluation_process"] = tuple(options["evaluation_process"])
    try:
        asyncio.run(run_worker(WorkerOptions(redis_url=os.environ["SELFPRUNER_REDIS__URL"], **options)))
    except SelfPrunerError as error:
        sys.stderr.write(json.dumps({"event": "ended", "error": str(error)}) + "\n")
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
