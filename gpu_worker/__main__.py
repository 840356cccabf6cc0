"""`python -m gpu_worker`: one worker as a process. `selfpruner worker` is the same for people."""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from gpu_worker.worker import WorkerOptions, run_worker
from protocol import logs
from protocol.connection import password_of
from protocol.errors import SelfPrunerError, UsageError


def main() -> int:
    """Parse the arguments, work, and return the exit code: 2 for what the user must mend."""
    parser = argparse.ArgumentParser(prog="python -m gpu_worker", description=__doc__)
    # A URL may hold a password, which others can read in the list of processes; the environment is better.
    parser.add_argument("--redis-url", default=os.environ.get("SELFPRUNER_REDIS__URL", "redis://127.0.0.1:6379"))
    parser.add_argument("--search", default="default")
    parser.add_argument("--lease-seconds", type=float, default=WorkerOptions.lease_seconds)
    parser.add_argument("--max-evaluation-seconds", type=float, default=WorkerOptions.max_evaluation_seconds)
    parser.add_argument("--max-preparation-seconds", type=float, default=WorkerOptions.max_preparation_seconds)
    parser.add_argument("--grace-seconds", type=float, default=WorkerOptions.grace_seconds)
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("--quiet", action="store_true", help="no log on the console")
    arguments = parser.parse_args()
    logs.configure(file=arguments.log_file, console=not arguments.quiet, secrets=password_of(arguments.redis_url))
    options = WorkerOptions(
        redis_url=arguments.redis_url,
        search=arguments.search,
        lease_seconds=arguments.lease_seconds,
        max_evaluation_seconds=arguments.max_evaluation_seconds,
        max_preparation_seconds=arguments.max_preparation_seconds,
        grace_seconds=arguments.grace_seconds,
    )
    try:
        asyncio.run(run_worker(options))
    except SelfPrunerError as error:
        print(f"selfpruner: {error}", file=sys.stderr)  # noqa: T201  (the one sentence for a person)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
