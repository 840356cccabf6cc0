"""Settings of the services around a search: Redis, workers, HTTP API, folders."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt, SecretStr

from daemon.settings.section import Section
from protocol.errors import SettingsError
from protocol.queue.connection import check_url, with_password
from protocol.queue.jobs import LEAST_LEASE_SECONDS, MOST_SECONDS


class RedisSettings(Section):
    """Where the search keeps its state."""

    url: Annotated[str, AfterValidator(check_url)] | None = None
    """`redis://…`, `rediss://…` or `unix:///…`. None: `selfpruner run` starts an embedded Valkey."""
    password_file: Path | None = None
    """A file with the password (a Docker or Kubernetes secret), for a URL without one."""

    @property
    def full_url(self) -> str | None:
        """The URL with the password of its file. Raises SettingsError where that cannot be had."""
        if self.url is None and self.password_file is not None:
            raise SettingsError("redis.password_file is set, but redis.url is missing")
        return self.url and with_password(self.url, self.password_file)


class WorkerSettings(Section):
    """How workers hold their jobs."""

    count: PositiveInt = 1
    """Workers that `selfpruner run` starts."""
    lease_seconds: float = Field(default=30.0, ge=LEAST_LEASE_SECONDS, le=MOST_SECONDS)
    """A job whose worker shows no sign of life for so long is given to another."""
    max_evaluation_seconds: float = Field(default=1800.0, gt=0, le=MOST_SECONDS)
    """An evaluation that takes longer is killed and counts as failed."""
    max_preparation_seconds: float = Field(default=14_400.0, gt=0, le=MOST_SECONDS)
    """A model that takes longer to load and calibrate is killed and tried again, three times in all."""


_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,256}")


def check_token(token: SecretStr) -> SecretStr:
    """Return `token` if it may guard the HTTP API; the error does not show it."""
    if token.get_secret_value() and not _TOKEN.fullmatch(token.get_secret_value()):
        raise ValueError("a token has 16 to 256 letters, digits and . _ ~ + / = -, or is empty to ask for none")
    return token


def _host_name(host: str) -> str:
    try:
        whole = host.encode("idna") and host.isprintable() and " " not in host
    except ValueError:
        whole = False
    if not whole:
        raise ValueError("it is no address and no name of a host")
    return host


class HttpSettings(Section):
    """The HTTP API of the daemon: status, events, control and metrics."""

    enabled: bool = True
    """Serve it."""
    host: Annotated[str, AfterValidator(_host_name)] = "127.0.0.1"
    """The address to listen on. Beyond loopback (`0.0.0.0` is every interface) a token is compulsory."""
    port: int | None = Field(default=None, ge=0, le=65535)
    """None means 8090, or any free port for `selfpruner run` where that is taken; 0 means any free port."""
    token: Annotated[SecretStr, AfterValidator(check_token)] | None = None
    """What requests must bear. None: made at random and kept in `http-token` of the search's folder. Empty: none."""
    token_file: Path | None = None
    """A file with the token (a Docker or Kubernetes secret)."""
    allowed_hosts: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9.:-]+$")], ...] = ()
    """Names that the server may be called by, beside `localhost`, loopback addresses and http.host."""

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class RunSettings(Section):
    """Files."""

    folder: Path = Path("runs")
    """Holds a folder for each search."""
