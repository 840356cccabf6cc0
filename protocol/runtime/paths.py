"""Paths as people write them."""

from pathlib import Path

from protocol.errors import SettingsError


def expanded(path: Path | str) -> Path:
    """`path` with a leading ~ or ~user as the folder that it stands for.

    Raises SettingsError for a path that cannot be: with a NUL, of no user's, too long, or in a folder that may not be
    entered. Whether something is there can be asked without an error then.
    """
    if "\0" in str(path):
        raise SettingsError(f"{str(path)!r} is no path")
    try:
        found = Path(path).expanduser()
        found.exists()
        return found
    except OSError as error:
        raise SettingsError(f"the path {str(path)[:100]!r} cannot be used: {error.strerror}") from None
    except RuntimeError:
        raise SettingsError(f"{str(path)!r} begins with ~, and that user has no home folder here") from None


def are_one_file(one: str, other: str) -> bool:
    """Whether two paths, `~` and links followed, lead to one file; where there is none, whether they are one path."""
    paths = expanded(one), expanded(other)
    try:
        return paths[0].samefile(paths[1])
    except OSError:
        return paths[0].absolute() == paths[1].absolute()
