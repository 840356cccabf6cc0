"""`python -m gpu_worker`: run one worker process. Users run the same worker with `selfpruner worker`."""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from gpu_worker.worker.options import WorkerOptions, worker_options
from gpu_worker.worker.worker import PUBLISHED, run_worker
from protocol.errors import SelfPrunerError, SettingsError, UsageError
from protocol.queue.connection import password_of
from protocol.runtime import logs


def main() -> int:
    """Parse the arguments, run the worker and return the exit code: 2 for invalid input, 1 for other errors."""
    flags = vars(_parser().parse_args())
    log_file, quiet, in_run = (flags.pop(name) for name in ("log_file", "quiet", "in_run"))
    try:
        options = worker_options(**flags)
        _configure_logs(log_file, console=not quiet, secrets=password_of(options.redis_url))
        asyncio.run(run_worker(options))
    except SelfPrunerError as error:
        if in_run and PUBLISHED in getattr(error, "__notes__", ()):
            return 2  # `selfpruner run` shows what the worker has published
        print(f"selfpruner: {error}", file=sys.stderr)  # noqa: T201  (the one sentence that the user reads)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu_worker", description=__doc__)
    # A URL may contain a password, and other users can read command lines: the environment variable is safer.
    parser.add_argument("--redis-url", default=os.environ.get("SELFPRUNER_REDIS__URL", "redis://127.0.0.1:6379"))
    password_file = os.environ.get("SELFPRUNER_REDIS__PASSWORD_FILE")
    parser.add_argument("--redis-password-file", type=Path, default=Path(password_file) if password_file else None)
    parser.add_argument("--search", default="default")
    parser.add_argument("--lease-seconds", type=float, default=WorkerOptions.lease_seconds)
    parser.add_argument("--max-evaluation-seconds", type=float, default=WorkerOptions.max_evaluation_seconds)
    parser.add_argument("--max-preparation-seconds", type=float, default=WorkerOptions.max_preparation_seconds)
    parser.add_argument("--grace-seconds", type=float, default=WorkerOptions.grace_seconds)
    parser.add_argument("--own-gpu", action="store_true", help="use one GPU that no other worker on this machine uses")
    parser.add_argument("--exit-when-done", action="store_true", help="exit once the search has ended")
    parser.add_argument("--idle-seconds", type=float, help="exit after this time without a candidate")
    parser.add_argument("--alive-file", type=Path, help="a file to touch every few seconds, for liveness probes")
    parser.add_argument("--spec", help="evaluate only the spec with this fingerprint, and wait until it is published")
    parser.add_argument("--in-run", action="store_true", help="started by `selfpruner run`, which reports its errors")
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("--quiet", action="store_true", help="write no log to the console")
    return parser


def _configure_logs(file: Path | None, *, console: bool, secrets: list[str]) -> None:
    try:
        logs.configure(file=file, console=console, secrets=secrets)
    except OSError as error:
        raise SettingsError(f"--log-file {str(file)!r} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
