"""Paths as people write them."""

from pathlib import Path

from protocol.errors import SettingsError


def expanded(path: Path | str) -> Path:
    """`path` with a leading ~ or ~user as the folder that it stands for; SettingsError where there can be none."""
    if "\0" in str(path):
        raise SettingsError(f"{str(path)!r} is no path")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise SettingsError(f"{str(path)!r} begins with ~, and that user has no home folder here") from None


def are_one_file(one: str, other: str) -> bool:
    """Whether two paths, `~` and links followed, lead to one file; where there is none, whether they are one path."""
    paths = expanded(one), expanded(other)
    try:
        return paths[0].samefile(paths[1])
    except OSError:
        return paths[0].absolute() == paths[1].absolute()
