"""Optional packages, and the extras that install them."""

from importlib.util import find_spec

from protocol.errors import SettingsError


def need(package: str, extra: str) -> None:
    """Raise SettingsError, with the pip command, if `package` is not installed."""
    if find_spec(package) is None:
        raise SettingsError(f"this needs the package {package}: pip install 'self-pruner[{extra}]'")
