"""Every setting with its meaning, its unit and its default; daemon/settings/sources.py reads them."""

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from daemon.settings.llm import LlmSettings, LocalLlmSettings
from daemon.settings.section import Section
from protocol.errors import DataError, SettingsError
from protocol.plans.allocation import Method
from protocol.plans.plan import Split
from protocol.plans.rates import DECIMALS
from protocol.plans.shape import Granularity
from protocol.plans.spec import NAMED_TEXTS, Dtype, Importance, Measure, Reconstruction, Scoring, SearchSpec, TextSpec
from protocol.queue.connection import check_url, with_password
from protocol.queue.jobs import LEAST_LEASE_SECONDS, MOST_SECONDS
from protocol.queue.keys import check_search_name
from protocol.runtime.paths import expanded

ENV_PREFIX = "SELFPRUNER_"
ProposerName = Literal["llm", "best-of-n", "random", "evolution", "cma-es"]


def _five_decimals(rate: float) -> float:
    if round(rate, DECIMALS) != rate:
        raise ValueError(f"give it at most {DECIMALS} decimals")
    return rate


class SearchSettings(Section):
    """How the search goes: Algorithm 1's K, M, S and N, and what its rates apply to."""

    name: Annotated[str, AfterValidator(check_search_name)] = "default"
    """Names the search in Redis and its folder under run.folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds windows, prompts' sampling and the classical operators."""
    population: PositiveInt = 30
    """K: candidates of the first population, and parents kept each round."""
    mutations: int = Field(default=10, ge=0)
    """M: offspring by mutation each round."""
    crossovers: int = Field(default=10, ge=0)
    """S: offspring by crossover each round."""
    rounds: int = Field(default=20, ge=0)
    """N: rounds after the first population."""
    mode: Literal["generational", "steady-state"] = "generational"
    """`generational` (the paper): rounds wait for their outcomes. `steady-state`: each outcome brings a question."""
    max_in_flight: PositiveInt = 4
    """steady-state: candidates asked for, queued and measured at a time; about two for each worker."""
    max_evaluations: PositiveInt | None = None
    """Stop proposing after so many candidates, whatever the rounds; none means no limit."""
    max_tokens: PositiveInt | None = None
    """Stop, after a round, when candidates were measured on so many tokens: search.first_windows saves some; none means
    no limit. The first population must fit, and search.rounds must be enough for the rest."""
    budget_hours: PositiveFloat | None = None
    """Stop proposing when the daemon has run so long, restarts and pauses included; none means no limit."""
    seeds: tuple[Method, ...] = ()
    """Allocations that take part in the first population: of `uniform`, `first-layer`, `owl`, `llm-pruner`,
    `sensitivity`."""
    proposer: ProposerName = "llm"
    """`llm` (the paper), `best-of-n` (the LLM without feedback), `random`, `evolution` (EvoPress) or `cma-es`."""
    initializer: Literal["llm", "random"] = "llm"
    """With the proposer `llm`: who makes the first population."""
    selector: Literal["llm", "tournament", "none"] = "llm"
    """Who chooses parents; `none`: Mutator and Crossover choose themselves, from the whole population (the paper)."""
    mutator: Literal["llm", "classical", "ranked"] = "llm"
    """Who mutates; `ranked` draws from a surrogate's trades. search.mutations: 0 leaves mutation out."""
    crossover: Literal["llm", "classical", "ranked"] = "llm"
    """Who crosses; `ranked` draws from a surrogate's mixes. search.crossovers: 0 leaves crossover out."""
    first_windows: PositiveInt | None = None
    """Multi-fidelity: a candidate that is worse than the K-th best (with `evolution`: the best) on so many windows is
    measured no further; none: all are measured whole."""
    fitness: Measure = "perplexity"
    """What the search minimises on data.fitness: `perplexity` (the paper), or `kl`, divergence from the dense model."""
    granularity: Granularity = "layer"
    """What a rate applies to: `layer` (the paper) or `block` (attention and MLP apart)."""
    split: Split = "equal"
    """At layer granularity, how heads and MLP share a rate: `equal` (the paper) or `mlp-first`."""
    importance: Importance = "wanda-sp"
    """How heads and channels are scored: `wanda-sp`, `taylor` (LLM-Pruner), `magnitude` or `obs` (what the rest can
    make up for goes first)."""
    scoring: Scoring = "dense"
    """`dense`: once. `sequential`: for each candidate anew, each layer on the pruned ones below (only wanda-sp)."""
    reconstruction: Reconstruction = "none"
    """`none` (the paper), or `least-squares`: what stays of o and down is fitted to make up for what is removed."""
    lowest_rate: float = Field(default=0.0, ge=0, lt=1)
    """No unit is pruned less than this share."""
    highest_rate: float = Field(default=0.95, gt=0, lt=1)
    """No unit is pruned more than this share."""

    @model_validator(mode="after")
    def _fits_together(self) -> "SearchSettings":
        if self.max_evaluations is not None and self.max_evaluations < self.population:
            raise ValueError(
                f"search.max_evaluations ({self.max_evaluations}) is smaller than the first population "
                f"({self.population}): give more, or a smaller search.population"
            )
        if len(self.seeds) > self.population:
            raise ValueError(
                f"search.seeds: {len(self.seeds)} seeds are more than the first population ({self.population}) holds"
            )
        if self.mode == "steady-state":
            if self.proposer == "cma-es":
                raise ValueError("the proposer `cma-es` learns from generations: search.mode cannot be `steady-state`")
            if self.mutations + self.crossovers == 0:
                raise ValueError("search.mode `steady-state` needs search.mutations or search.crossovers")
        for agent in ("initializer", "selector", "mutator", "crossover"):
            if self.proposer != "llm" and getattr(self, agent) != "llm":
                raise ValueError(f"search.{agent} is for the proposer `llm`, not for {self.proposer!r}")
        return self

    def check_first_population(self, tokens: int) -> None:
        """Raise ValueError where the first population alone takes more than max_tokens; `tokens` are of each."""
        if self.max_tokens is not None and self.max_tokens < self.population * tokens:
            raise ValueError(
                f"search.max_tokens ({self.max_tokens:,}) is smaller than what the first population takes "
                f"({self.population} x {tokens:,}): give more, or a smaller search.population"
            )

    @property
    def asks_llm(self) -> bool:
        """Whether any agent asks an LLM."""
        agents: list[str] = [self.initializer, self.selector]
        agents += [self.mutator] if self.mutations else []
        agents += [self.crossover] if self.crossovers else []
        return self.proposer in ("llm", "best-of-n") and "llm" in agents


class TargetSettings(Section):
    """The model to prune, and how far."""

    model: str = Field(min_length=1)
    """A hub name, a folder, or `smollm2`."""
    rate: Annotated[float, AfterValidator(_five_decimals)] = Field(gt=0, le=0.9)
    """β: the share of decoder-layer parameters to remove, above 0 and up to 0.9."""
    multiple_of: PositiveInt = 1
    """MLP widths are multiples of this many channels (64 or 128 suits tensor cores)."""
    dtype: Dtype = "bfloat16"
    """Of weights and activations."""


class DataSettings(Section):
    """The texts: scored on, searched on, reported on. Each is `wikitext2`, `c4`, `self`, or a text file."""

    calibration: str = "wikitext2"
    """The text that importance is scored on."""
    calibration_windows: PositiveInt = 128
    """Windows of it."""
    fitness: str = "wikitext2"
    """The text that candidates are measured on."""
    fitness_windows: PositiveInt | None = None
    """Windows of it; none means the whole text."""
    report: str | None = None
    """A third text, which dense, uniform and best are measured on at the end."""
    report_windows: PositiveInt | None = None
    """Windows of it; none means the whole text."""
    seqlen: int = Field(default=2048, ge=16)
    """Tokens of a window."""


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


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__", validate_default=True
    )

    search: SearchSettings = SearchSettings()
    target: TargetSettings
    data: DataSettings = DataSettings()
    llm: LlmSettings = LlmSettings()
    local_llm: LocalLlmSettings = LocalLlmSettings()
    redis: RedisSettings = RedisSettings()
    worker: WorkerSettings = WorkerSettings()
    http: HttpSettings = HttpSettings()
    run: RunSettings = RunSettings()

    @model_validator(mode="after")
    def _fits_together(self) -> "Settings":
        windows, first = self.data.fitness_windows, self.search.first_windows
        if windows is not None and first is not None and windows <= first:
            raise ValueError(f"search.first_windows ({first}) must be fewer than data.fitness_windows ({windows})")
        if windows is not None:
            self.search.check_first_population(windows * (self.data.seqlen - 1))
        return self

    def spec(self) -> SearchSpec:
        """What decides a result, out of all settings."""
        return SearchSpec(
            model=self.target.model,
            rate=self.target.rate,
            granularity=self.search.granularity,
            split=self.search.split,
            lowest_rate=self.search.lowest_rate,
            highest_rate=self.search.highest_rate,
            multiple_of=self.target.multiple_of,
            importance=self.search.importance,
            scoring=self.search.scoring,
            reconstruction=self.search.reconstruction,
            calibration=self._text(self.data.calibration, self.data.calibration_windows),
            fitness=self._text(self.data.fitness, self.data.fitness_windows),
            measure=self.search.fitness,
            report=self._text(self.data.report, self.data.report_windows) if self.data.report else None,
            dtype=self.target.dtype,
            seed=self.search.seed,
        )

    def _text(self, source: str, windows: int | None) -> TextSpec:
        return text_spec(source, windows, self.data.seqlen)

    @property
    def folder(self) -> Path:
        """The folder of this search."""
        return self.run.folder / self.search.name


def text_spec(source: str, windows: int | None, seqlen: int) -> TextSpec:
    """A named text, or a file by its absolute path: a worker may run in another folder."""
    path = source if source in NAMED_TEXTS else str(expanded(source).absolute())
    return TextSpec(source=path, windows=windows, seqlen=seqlen)


def check_text(source: str) -> None:
    """Raise DataError where a text is a file that is not on this machine."""
    if source not in NAMED_TEXTS and not expanded(source).is_file():
        raise DataError(f"there is no text file {source!r}; give a file, or one of {', '.join(NAMED_TEXTS)}")


def setting_names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings; items of a list are not named."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
