"""A real worker with a fake evaluation process: `python -m tests.faults.worker_process JSON` (WorkerOptions, crash_at).

`crash_at` ends it as SIGKILL would, at its first pass: `claimed` (it has a job), `measured` (it has an outcome, not
committed), `committed`.
"""

import asyncio
import json
import os
import signal
import sys
from typing import Any

from gpu_worker import worker as worker_module
from gpu_worker.worker import WorkerOptions, run_worker
from protocol import logs
from protocol.candidate import Failed, Measured
from protocol.errors import SelfPrunerError, UsageError
from protocol.jobs import Job, JobQueue


class CrashingQueue(JobQueue):
    """Ends the process at one step."""

    crash_at = ""

    async def claim(self) -> Job | None:
        job = await super().claim()
        if job:
            self._crash("claimed")
        return job

    async def commit(self, job: Job, outcome: Measured | Failed) -> bool:
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
