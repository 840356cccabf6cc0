"""The user's cache folder, whose entries are written atomically."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/selfpruner`, or `~/.cache/selfpruner`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "selfpruner"


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache. If it does not exist, `write` fills it first.

    `write` gets an empty folder, which is renamed into place when it returns. When two processes write at the same
    time, the first to finish wins.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        write(unfinished)
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target
