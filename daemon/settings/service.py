"""Settings of the services around a search: Redis, workers, HTTP API, folders."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, SecretStr

from daemon.settings.section import Section
from protocol.errors import SettingsError
from protocol.queue.connection import check_url, with_password
from protocol.queue.jobs import LEAST_LEASE_SECONDS, MOST_SECONDS


class RedisSettings(Section):
    """The Redis or Valkey server that holds the search's state."""

    url: Annotated[str, AfterValidator(check_url)] | None = None
    """A `redis://…`, `rediss://…` or `unix:///…` URL. If none, `selfpruner run` starts an embedded Valkey; `selfpruner
    daemon` needs a URL."""
    password_file: Path | None = None
    """A file that holds the password, such as a Docker or Kubernetes secret; redis.url must then contain no
    password."""

    @property
    def full_url(self) -> str | None:
        """The URL with the password from its file. Raises SettingsError if the file cannot be read."""
        if self.url is None and self.password_file is not None:
            raise SettingsError("redis.password_file is set, but redis.url is missing")
        return self.url and with_password(self.url, self.password_file)


class WorkerSettings(Section):
    """Workers and their time limits."""

    count: PositiveInt = 1
    """Number of workers that `selfpruner run` starts. Several take one GPU each, on a machine with GPUs."""
    lease_seconds: float = Field(default=30.0, ge=LEAST_LEASE_SECONDS, le=MOST_SECONDS)
    """Seconds without a heartbeat after which a worker's job is given to another worker."""
    max_evaluation_seconds: float = Field(default=1800.0, gt=0, le=MOST_SECONDS)
    """Time limit in seconds for one evaluation; a longer evaluation is killed and counts as failed."""
    max_preparation_seconds: float = Field(default=14_400.0, gt=0, le=MOST_SECONDS)
    """Time limit in seconds for loading and calibrating the model. A worker tries three times."""


_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,256}")


def check_token(token: SecretStr) -> SecretStr:
    """Return `token` if it can protect the HTTP API; the error does not show it."""
    if token.get_secret_value() and not _TOKEN.fullmatch(token.get_secret_value()):
        raise ValueError("a token has 16 to 256 letters, digits and . _ ~ + / = -, or is empty (no authentication)")
    return token


def _host_name(host: str) -> str:
    try:
        whole = host.encode("idna") and host.isprintable() and " " not in host
    except ValueError:
        whole = False
    if not whole:
        raise ValueError("it is neither an address nor a host name")
    return host


class HttpSettings(Section):
    """The HTTP API of the daemon: status, events, control and metrics."""

    enabled: bool = True
    """Serve the HTTP API."""
    host: Annotated[str, AfterValidator(_host_name)] = "127.0.0.1"
    """The address to listen on, such as `0.0.0.0` for all interfaces. Any address but loopback requires a token."""
    port: int | None = Field(default=None, ge=0, le=65535)
    """The port. None means 8090; if that is in use, `selfpruner run` takes any free port. 0 means any free port."""
    token: Annotated[SecretStr, AfterValidator(check_token)] | None = None
    """The bearer token that requests must send. If none, a random token is made and kept in the file `http-token` of
    the search's folder. An empty string turns authentication off."""
    token_file: Path | None = None
    """A file that holds the token, such as a Docker or Kubernetes secret."""
    allowed_hosts: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9.:-]+$")], ...] = ()
    """Host names by which clients may address the API, besides `localhost`, loopback addresses and http.host."""

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio"]


class RunSettings(Section):
    """Where searches are kept, and the experiment trackers that they are sent to."""

    folder: Path = Path("runs")
    """The folder that holds a subfolder for each search: its log, its best rates and its evaluations."""
    trackers: tuple[TrackerName, ...] = ()
    """Experiment trackers that get the curves, rates, settings and report of the search, any of `tensorboard`,
    `mlflow`, `wandb` and `trackio`. Each is an extra of the same name, and writes into the search's folder unless its
    own environment variables say otherwise."""
