"""Optional packages: which extra brings one that is missing."""

from importlib.util import find_spec

from protocol.errors import SettingsError


def need(package: str, extra: str) -> None:
    """Raise SettingsError, with the pip line, where `package` is not installed."""
    if find_spec(package) is None:
        raise SettingsError(f"this needs the package {package}: pip install 'self-pruner[{extra}]'")
