"""Folders of results: one call at a time, and one sentence where they cannot be written."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from daemon.local.folder_lock import lock_folder
from protocol.errors import SearchExistsError, SettingsError, UsageError


def make_folder(out: Path) -> None:
    """Make the folder `out`, unless it is there. Raises SettingsError where it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out {out} cannot be made: {error.strerror}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Write the file `path`, or files in it, in the block. Raises UsageError where the disk is full, or the like."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def the_only_one(out: Path, refusal: str) -> Iterator[None]:
    """Hold `out`, which is made; the end of the process frees it.

    Raises UsageError: with `refusal` where another process holds it, else where it cannot be made or written.
    """
    make_folder(out)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(out))
        except SearchExistsError as error:
            raise SearchExistsError(refusal) from error
        except UsageError as error:
            raise SettingsError(f"--out {out} cannot be written") from error
        yield
