"""Output folders of benchmarks: locked by one process at a time, with one-sentence errors if they cannot be written."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from daemon.local import folder_lock
from protocol.errors import SearchExistsError, SettingsError, UsageError


def make_folder(out: Path) -> None:
    """Create the folder `out` if missing. Raises SettingsError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out {out} cannot be created: {error.strerror}") from error


@contextmanager
def reporting_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes to `path`, into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def lock_folder(out: Path, refusal: str) -> Iterator[None]:
    """Create the folder `out` and lock it in the block. The lock also ends with the process.

    Raises UsageError if another process holds the lock (with the message `refusal`), or if `out` cannot be created or
    written.
    """
    make_folder(out)
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock.lock_folder(out))
        except SearchExistsError as error:
            raise SearchExistsError(refusal) from error
        except UsageError as error:
            raise SettingsError(f"--out {out} cannot be written") from error
        yield
