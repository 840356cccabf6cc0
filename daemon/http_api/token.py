"""The token of the HTTP API, from the settings or kept in the search's folder, and the file that opens its page."""

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

from pydantic import SecretStr

from daemon.settings.service import HttpSettings, check_token
from protocol.errors import SettingsError, UsageError
from protocol.runtime.files import write_atomically
from protocol.runtime.secret_files import read_secret

TOKEN_FILE = "http-token"
TOKEN_MODE = 0o600
PAGE_FILE = "open.html"
REDIRECT = """<!doctype html><meta charset="utf-8"><title>Self-Pruner</title>
<meta http-equiv="refresh" content="0; url={address}"><a href="{address}">page of the search</a>
"""


@dataclass(frozen=True)
class Access:
    """The token that requests need; `kept_in` is the file of a generated token."""

    token: SecretStr | None
    kept_in: Path | None = None

    @property
    def secrets(self) -> list[str]:
        """Values to redact in the log."""
        return [self.token.get_secret_value()] if self.token else []

    def address(self, url: str) -> str:
        """Return the address of the page at `url` for a browser, with a generated token.

        What follows `#` in an address stays in the browser.
        """
        url = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")  # all interfaces
        return f"{url}/#token={self.token.get_secret_value()}" if self.token and self.kept_in else url


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


@contextmanager
def page_file(access: Access | None, url: str | None, folder: Path) -> Iterator[None]:
    """Keep a file in the search's folder, while the block runs, that leads a browser to the page at `url`.

    Without a page (`access` or `url` is None), remove the file of an earlier process, which would lead nowhere.

    A browser is started with the name of this file, not with the address and its token, because every user of a
    machine can list the command lines of all processes. Only the owner can read the file. Jupyter does the same. If
    this process is killed, the file remains, and contains nothing that `http-token` does not. A file in the folder for
    temporary files does not work: browsers installed by Snap or Flatpak cannot read it.
    """
    file = folder / PAGE_FILE
    text = REDIRECT.format(address=escape(access.address(url))) if access and url else None
    with contextlib.suppress(OSError):  # a full disk must not end the search
        if text is None:
            file.unlink()
        else:
            write_atomically(file, text, mode=TOKEN_MODE)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if file.is_file() and file.read_text(errors="replace") == text:  # not that of a process that replaced us
                file.unlink()


def kept_address(folder: Path) -> str | None:
    """Return the address that the page file in `folder` leads to; None if there is no such file."""
    file = folder / PAGE_FILE
    if not file.is_file():
        return None
    found = re.search('href="([^"]+)"', file.read_text(encoding="utf-8", errors="replace"))
    return unescape(found[1]) if found else None


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
