"""All settings: a YAML file, then the environment (SELFPRUNER_SEARCH__NAME), then --set search.name=… of the command.

An unknown setting is an error that names the nearest right one.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from protocol.errors import DataError, SettingsError
from protocol.keys import check_search_name
from protocol.plan import Split
from protocol.rates import DECIMALS
from protocol.shape import Granularity
from protocol.spec import Dtype, Importance, Measure, Scoring, SearchSpec, TextSpec

ENV_PREFIX = "SELFPRUNER_"
NAMED_TEXTS = ("wikitext2", "self")


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )


def _five_decimals(rate: float) -> float:
    if round(rate, DECIMALS) != rate:
        raise ValueError(f"give it at most {DECIMALS} decimals")
    return rate


class SearchSettings(_Section):
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
    max_evaluations: PositiveInt | None = None
    """Stop proposing after so many candidates, whatever the rounds; none means no limit."""
    fitness: Measure = "perplexity"
    """What the search minimises on data.fitness: `perplexity` (the paper), or `kl`, divergence from the dense model."""
    granularity: Granularity = "layer"
    """What a rate applies to: `layer` (the paper) or `block` (attention and MLP apart)."""
    split: Split = "equal"
    """At layer granularity, how heads and MLP share a rate: `equal` (the paper) or `mlp-first`."""
    importance: Importance = "wanda-sp"
    """How heads and channels are scored: `wanda-sp`, `taylor` (LLM-Pruner) or `magnitude`."""
    scoring: Scoring = "dense"
    """`dense`: once. `sequential`: for each candidate anew, each layer on the pruned ones below (only wanda-sp)."""
    lowest_rate: float = Field(default=0.0, ge=0, lt=1)
    """No unit is pruned less than this share."""
    highest_rate: float = Field(default=0.95, gt=0, lt=1)
    """No unit is pruned more than this share."""


class TargetSettings(_Section):
    """The model to prune, and how far."""

    model: str = Field(min_length=1)
    """A hub name, a folder, or `smollm2`."""
    rate: Annotated[float, AfterValidator(_five_decimals)] = Field(gt=0, le=0.9)
    """β: the share of decoder-layer parameters to remove, above 0 and up to 0.9."""
    multiple_of: PositiveInt = 1
    """MLP widths are multiples of this many channels (64 or 128 suits tensor cores)."""
    dtype: Dtype = "bfloat16"
    """Of weights and activations."""


class DataSettings(_Section):
    """The texts: scored on, searched on, reported on. Each is `wikitext2`, `self`, or a text file."""

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


class EndpointSettings(_Section):
    """An OpenAI-compatible endpoint."""

    base_url: str = Field(pattern=r"^https?://")
    """Up to and including /v1."""
    model: str
    """The model's name at this endpoint."""
    api_key: SecretStr | None = None
    """Its key; sent to this endpoint only. Better given as `api_key_file`."""
    api_key_file: Path | None = None
    """A file with the key (a Docker or Kubernetes secret)."""
    name: str | None = None
    """As logs call it; the URL's host where left out."""


class LlmSettings(_Section):
    """The LLM that runs the search, and how it is asked."""

    endpoints: tuple[EndpointSettings, ...] = ()
    """Asked in this order, the next when one fails. Empty: `selfpruner run` serves a small model itself."""
    reply: Literal["lists", "edits"] = "lists"
    """`lists`: whole configurations (the paper). `edits`: a profile, a few changes, a mix; a tenth of the tokens."""
    proposals_per_call: PositiveInt | None = None
    """Candidates asked for in one call; none means all at once for `lists`, one for `edits`."""
    reasks: int = Field(default=2, ge=0, le=10)
    """How often a bad reply is answered with what was wrong before the classical operator stands in."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Of the LLM's sampling."""
    max_tokens: PositiveInt = 4096
    """At most so many tokens in one reply."""
    attempts: PositiveInt = 4
    """HTTP attempts of one question at one endpoint."""
    deadline_seconds: PositiveFloat = 300.0
    """For one question, retries included."""
    max_reply_bytes: PositiveInt = 1_000_000
    """A longer HTTP reply is cut off and refused."""
    concurrency: PositiveInt = 4
    """Questions under way at once."""


class LocalLlmSettings(_Section):
    """The small LLM that `selfpruner run` serves where llm.endpoints is empty."""

    gguf: str = "smollm2"
    """A GGUF file, or `smollm2`."""
    context: PositiveInt = 8192
    """Tokens of context, shared by the parallel slots."""
    slots: PositiveInt = 2
    """Questions answered at once."""
    threads: PositiveInt | None = None
    """CPU threads; none means half of the cores, for the worker needs the others."""


class RedisSettings(_Section):
    """Where the search keeps its state."""

    url: str | None = None
    """`redis://…`, `rediss://…` or `unix:///…`. None: `selfpruner run` starts an embedded Valkey."""


class WorkerSettings(_Section):
    """How workers hold their jobs."""

    count: PositiveInt = 1
    """Workers that `selfpruner run` starts."""
    lease_seconds: float = Field(default=30.0, ge=0.5)
    """A job whose worker shows no sign of life for so long is given to another."""
    max_evaluation_seconds: PositiveFloat = 1800.0
    """An evaluation that takes longer is killed and counts as failed."""
    max_preparation_seconds: PositiveFloat = 14_400.0
    """A model that takes longer to load and calibrate is killed and tried again, three times in all."""


class RunSettings(_Section):
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
    run: RunSettings = RunSettings()

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


def load(config: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from the YAML file `config`, the environment, and `overrides` of the form `search.name=value`.

    Raises SettingsError, with one sentence, for whatever is wrong.
    """
    if config is not None and not config.is_file():
        raise SettingsError(f"there is no settings file {str(config)!r}")

    class Sources(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=config)

    _check_environment(os.environ)
    try:
        settings = Sources(**_overrides(overrides))
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from error
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise SettingsError(f"{config} is no YAML mapping of settings: {_one_line(error)}") from error
    if settings.search.lowest_rate > settings.target.rate or settings.search.highest_rate < settings.target.rate:
        raise SettingsError(
            f"target.rate {settings.target.rate} cannot be reached with every unit between search.lowest_rate "
            f"{settings.search.lowest_rate} and search.highest_rate {settings.search.highest_rate}"
        )
    try:
        settings.spec()
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from error
    return settings


def text_spec(source: str, windows: int | None, seqlen: int) -> TextSpec:
    """A named text, or a file by its absolute path: a worker may run in another folder."""
    path = source if source in NAMED_TEXTS else str(Path(source).expanduser().absolute())
    return TextSpec(source=path, windows=windows, seqlen=seqlen)


def check_text(source: str) -> None:
    """Raise DataError where a text is a file that is not on this machine."""
    if source not in NAMED_TEXTS and not Path(source).expanduser().is_file():
        raise DataError(f"there is no text file {source!r}; give a file, or one of {', '.join(NAMED_TEXTS)}")


def setting_names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings; items of a list are not named."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _overrides(overrides: Iterable[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise SettingsError(f"--set takes key=value, such as --set search.name=first, not {override!r}")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise SettingsError(f"the value of {name} is no YAML: {text!r}") from error
        *path, last = name.strip().split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise SettingsError(_unknown(name))
        branch[last] = value
    return tree


def _check_environment(environ: Iterable[str]) -> None:
    """An environment variable that starts like ours but names no section would otherwise be ignored."""
    for variable in environ:
        if variable.upper().startswith(ENV_PREFIX):
            dotted = variable.upper().removeprefix(ENV_PREFIX).lower().replace("__", ".")
            if dotted.split(".")[0] not in Settings.model_fields:
                raise SettingsError(f"the environment variable {variable} names no setting: {_unknown(dotted)}")


def validation_sentence(error: ValidationError) -> str:
    """The first thing that is wrong, in one sentence."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(name)
    if first["type"] == "missing":
        return f"the setting {name} is missing"
    if isinstance(first.get("ctx", {}).get("error"), SettingsError):
        return str(first["ctx"]["error"])
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not name:  # two settings that do not go together
        return message
    if name.startswith(("llm.endpoints", "redis.url")):  # what was given may hold a key or a password
        return f"{name} cannot be what was given: {message}"
    return f"{name} cannot be {_one_line(first['input'])!r}: {message}"


def _unknown(name: str) -> str:
    names = list(setting_names())
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    near = near or [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    return f"there is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:120]
