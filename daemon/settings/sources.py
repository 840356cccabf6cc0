"""Settings from a YAML file, then the environment (SELFPRUNER_SEARCH__NAME), then --set search.name=… of the command.

An unknown setting is an error that names the nearest right one.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource

from daemon.settings import file as setting_file
from daemon.settings.errors import unknown, validation_sentence
from daemon.settings.service import HttpSettings
from daemon.settings.settings import ENV_PREFIX, Settings, setting_names
from protocol.errors import SettingsError


def load_or_quickstart(config: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Load settings as `load` does, of one or several rates; without a `config`, from quickstart.yaml."""
    with as_file(files("configs") / "quickstart.yaml") as quickstart:
        return load(config or quickstart, overrides, several_rates=True)


def load(config: Path | None, overrides: Sequence[str] = (), *, several_rates: bool = False) -> Settings:
    """Load settings from the YAML file `config`, the environment, and `overrides` of the form `search.name=value`.

    Raises SettingsError with one sentence, also for target.rates where `several_rates` are not possible.
    """
    from_file = {} if config is None else setting_file.read(config)
    _check_environment(os.environ)

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
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    try:
        settings = Sources(**_overrides_tree(overrides))
    except ValidationError as error:
        raise SettingsError(validation_sentence(error, setting_names())) from None  # it shows the values
    _check_text(settings.model_dump(), "")
    if settings.target.rates and not several_rates:
        raise SettingsError(
            "target.rates is for `selfpruner run`, which searches at one rate after the other: give target.rate here"
        )
    settings = settings.model_copy(update={"target": settings.target.with_rate()})
    _check_together(settings)
    return settings


def _check_text(value: Any, name: str) -> None:
    """Raise SettingsError for text that cannot be encoded as UTF-8, such as half of a surrogate pair."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_text(item, f"{name}.{number}")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"{name} is not text in UTF-8") from None


def _check_together(settings: Settings) -> None:
    """Raise SettingsError for settings of different sections that contradict each other."""
    for rate in settings.target.rates or (settings.target.known_rate,):
        if settings.search.lowest_rate > rate or settings.search.highest_rate < rate:
            raise SettingsError(
                f"target.rate {rate} cannot be reached with every unit between search.lowest_rate "
                f"{settings.search.lowest_rate} and search.highest_rate {settings.search.highest_rate}"
            )
    priced = [endpoint for endpoint in settings.llm.endpoints if endpoint.price_in or endpoint.price_out]
    if settings.llm.budget_cost is not None and not priced:
        raise SettingsError("llm.budget_cost needs price_in and price_out at the endpoints that are not free")
    _check_http(settings.http)
    try:
        settings.spec()
    except ValidationError as error:
        raise SettingsError(validation_sentence(error)) from error


def _check_http(http: HttpSettings) -> None:
    if http.token is not None and http.token_file is not None:
        raise SettingsError("give http.token or http.token_file, not both")
    if http.enabled and http.token is not None and not http.token.get_secret_value() and not http.on_loopback:
        raise SettingsError(f"http.host {http.host!r} can be reached from other machines: http.token must not be empty")


def _overrides_tree(overrides: Iterable[str]) -> dict[str, Any]:
    """Return the values of --set by section. Raises SettingsError, which shows no value, because it may be a key."""
    tree: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\s*[\w.-]+\s*", name):
            raise SettingsError("--set takes key=value, such as --set search.name=first")
        try:
            value = setting_file.parsed(text) if text else None
        except yaml.YAMLError:
            raise SettingsError(f"the value of {name} is not valid YAML") from None
        *path, last = name.strip().split(".")
        if any(part.isdigit() for part in (*path, last)):
            whole = re.sub(r"\.\d+(\..*)?$", "", name.strip())
            raise SettingsError(f"{name} cannot be set alone: give the whole list, as in --set '{whole}=[…]'")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise SettingsError(unknown(name, setting_names()))
        branch[last] = value
    return tree


def _check_environment(environ: Mapping[str, str]) -> None:
    """Raise SettingsError for a variable with our prefix that names no setting, or whose value is not JSON."""
    for variable, value in environ.items():
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        shown = variable if variable.isprintable() else ascii(variable)
        dotted = variable.upper().removeprefix(ENV_PREFIX).lower().replace("__", ".")
        if dotted.split(".")[0] not in Settings.model_fields:
            raise SettingsError(
                f"the environment variable {shown} names no setting: {unknown(dotted, setting_names())}"
            )
        try:
            if _is_json(dotted):
                json.loads(value)
        except (ValueError, RecursionError):
            raise SettingsError(f"the environment variable {variable} must hold JSON") from None


def _is_json(dotted: str) -> bool:
    """Whether this setting is JSON in the environment: a section or a list."""
    found: Any = Settings
    for part in dotted.split("."):
        field = found.model_fields.get(part) if _is_section(found) else None
        if field is None:
            return False
        found = field.annotation
    return get_origin(found) is tuple or _is_section(found)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
