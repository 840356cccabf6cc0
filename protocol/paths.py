"""Paths as people write them."""

from pathlib import Path

from protocol.errors import SettingsError


def expanded(path: Path | str) -> Path:
    """`path` with a leading ~ or ~user as the folder that it stands for. Raises SettingsError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise SettingsError(f"{str(path)!r} begins with ~, and that user has no home folder here") from None
