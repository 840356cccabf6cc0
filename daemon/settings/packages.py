"""Optional packages, and the extras that install them."""

from importlib.util import find_spec

from protocol.errors import SettingsError


def need(package: str, extra: str, what: str = "this", otherwise: str = "") -> None:
    """Raise SettingsError, with the pip command and what else to do, if `package` is not installed."""
    found = find_spec(package)
    if found is None or found.origin is None:  # a folder without code, such as the `wandb` that W&B makes for runs
        raise SettingsError(
            f"{what} needs the package {package}: pip install '.[{extra}]' in the folder of Self-Pruner{otherwise}"
        )
