"""The token of the HTTP API: from the settings, or random and kept in the search's folder."""

import contextlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from daemon.settings.service import HttpSettings, check_token
from protocol.errors import SettingsError, UsageError
from protocol.runtime.files import write_atomically
from protocol.runtime.secret_files import read_secret

TOKEN_FILE = "http-token"
TOKEN_MODE = 0o600


@dataclass(frozen=True)
class Access:
    """The token that requests need; `kept_in` is the file of a generated token."""

    token: SecretStr | None
    kept_in: Path | None = None

    @property
    def secrets(self) -> list[str]:
        """Values to redact in the log."""
        return [self.token.get_secret_value()] if self.token else []


def open_access(settings: HttpSettings, folder: Path) -> Access:
    """Return the access from `settings`. A generated token is the same at every start of the search in `folder`.

    Raises SettingsError for a file that cannot be read, and UsageError for a folder that cannot be written.
    """
    if settings.token_file is not None:
        return Access(_read_given(settings.token_file))
    if settings.token is not None:
        return Access(settings.token if settings.token.get_secret_value() else None)
    file = folder / TOKEN_FILE
    try:
        return Access(_read_kept(file) or _make(file), kept_in=file)
    except OSError as error:
        raise UsageError(f"the token of the HTTP API cannot be kept in {file}: {error.strerror}") from error


def _read_given(path: Path) -> SecretStr:
    try:
        token = SecretStr(read_secret(path))
        if not token.get_secret_value():
            raise SettingsError(f"http.token_file: the file {str(path)!r} is empty")
        return check_token(token)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingsError(f"http.token_file: {str(path)!r} cannot be used: {why}") from None


def _read_kept(file: Path) -> SecretStr | None:
    """Return the token of an earlier start; None if there is no valid one."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, encoding="utf-8", errors="replace") as opened:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        os.fchmod(handle, TOKEN_MODE)
        token = SecretStr(opened.read(1000).strip())
    with contextlib.suppress(ValueError):
        return check_token(token) if token.get_secret_value() else None
    return None


def _make(file: Path) -> SecretStr:
    token = SecretStr(secrets.token_urlsafe(32))
    write_atomically(file, kept_text(token), mode=TOKEN_MODE)
    return token


def kept_text(token: SecretStr) -> str:
    """Return the contents of a generated token's file."""
    return token.get_secret_value() + "\n"
