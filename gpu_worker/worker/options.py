"""A worker's options, built from the flags of `selfpruner worker` and `python -m gpu_worker`."""

from dataclasses import dataclass
from pathlib import Path

from gpu_worker.worker.evaluator import EVALUATION_PROCESS
from protocol.errors import SettingsError
from protocol.queue.connection import check_url, with_password
from protocol.queue.jobs import LEAST_LEASE_SECONDS, MOST_SECONDS
from protocol.queue.keys import check_search_name


@dataclass(frozen=True)
class WorkerOptions:
    """Options of a worker. Times are in seconds."""

    redis_url: str
    search: str
    lease_seconds: float = 30.0
    max_evaluation_seconds: float = 1800.0
    max_preparation_seconds: float = 14_400.0
    """Time limit for loading and calibrating the model. Loading a large model over a slow network takes hours."""
    grace_seconds: float = 20.0
    """Time that the running evaluation gets after SIGTERM before its job is handed back."""
    own_gpu: bool = False
    """Reserve a GPU that no other worker on this machine uses."""
    exit_when_done: bool = False
    """Exit once the search has ended, unless it had ended before this worker started."""
    idle_seconds: float | None = None
    """Exit after this time without a candidate, from when the worker is ready; None waits for ever."""
    alive_file: Path | None = None
    """A file that is touched while this process works, for liveness probes."""
    spec: str | None = None
    """Fingerprint of the only spec to evaluate; with None, the worker evaluates any spec that the search has."""
    evaluation_process: tuple[str, ...] = EVALUATION_PROCESS
    """Command that starts the evaluation process."""


def worker_options(
    *,
    search: str,
    redis_url: str,
    redis_password_file: Path | None,
    lease_seconds: float,
    max_evaluation_seconds: float,
    max_preparation_seconds: float,
    grace_seconds: float,
    own_gpu: bool,
    exit_when_done: bool = False,
    idle_seconds: float | None = None,
    alive_file: Path | None = None,
    spec: str | None = None,
) -> WorkerOptions:
    """Return the options for these flags. Raises SettingsError that names the invalid flag."""
    return WorkerOptions(
        redis_url=with_password(check_url(redis_url), redis_password_file),
        search=check_search_name(search),
        lease_seconds=_seconds("--lease-seconds", lease_seconds, least=LEAST_LEASE_SECONDS),
        max_evaluation_seconds=_seconds("--max-evaluation-seconds", max_evaluation_seconds, least=1e-3),
        max_preparation_seconds=_seconds("--max-preparation-seconds", max_preparation_seconds, least=1e-3),
        grace_seconds=_seconds("--grace-seconds", grace_seconds, least=0.0),
        own_gpu=own_gpu,
        exit_when_done=exit_when_done,
        idle_seconds=None if idle_seconds is None else _seconds("--idle-seconds", idle_seconds, least=0.0),
        alive_file=_touched(alive_file),
        spec=spec,
    )


def _touched(file: Path | None) -> Path | None:
    try:
        if file is not None:
            file.touch()
    except OSError as error:
        raise SettingsError(f"--alive-file {str(file)!r} cannot be written: {error.strerror}") from error
    return file


def _seconds(flag: str, value: float, *, least: float) -> float:
    if not least <= value <= MOST_SECONDS:  # NaN fails this too
        raise SettingsError(f"{flag} cannot be {value:g}: give {least:g} to {MOST_SECONDS:g} seconds")
    return value
