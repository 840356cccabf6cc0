"""All settings, with their meanings, units and defaults; daemon/settings/sources.py reads them."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import (
    BaseModel,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from daemon.settings.llm import LlmSettings, LocalLlmSettings
from daemon.settings.search import SearchSettings
from daemon.settings.service import HttpSettings, RedisSettings, RunSettings, WorkerSettings
from daemon.settings.target import DataSettings, TargetSettings, text_spec
from protocol.plans.spec import SearchSpec, TextSpec, is_examples
from protocol.queue.keys import check_search_name
from protocol.runtime.logs import Redaction

ENV_PREFIX = "SELFPRUNER_"
FRONT_COST = 1.5
"""Evaluations that the searches of several rates take together, divided by those of one search."""


class Settings(BaseSettings):
    """All settings by section."""

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
        if windows is not None and not is_examples(self.data.fitness):  # whose answers have any length
            self.search.check_first_population(windows * (self.data.seqlen - 1))
        return self

    def spec(self) -> SearchSpec:
        """Return the settings that determine a candidate's result."""
        return SearchSpec(
            model=self.target.model,
            rate=self.target.known_rate,
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

    @property
    def of_each_rate(self) -> "tuple[Settings, ...]":
        """The settings of each search of target.rates; without rates, only these settings.

        If agents use the surrogate, each search learns from those before it, and has a share of the budgets.
        """
        rates, search = self.target.rates, self.search
        if not rates:
            return (self,)
        learns = search.uses_surrogate(self.llm.reply)
        share = min(1.0, FRONT_COST / len(rates)) if learns else 1.0
        evaluations = max(math.ceil(share * search.planned), search.population)
        names = [f"{search.name}-{rate:g}" for rate in rates]
        return tuple(
            self.model_copy(
                update={
                    "target": self.target.model_copy(update={"rate": rate, "rates": ()}),
                    "search": search.model_copy(
                        update={
                            "name": check_search_name(name),
                            "learn_from": _others(name, (*search.learn_from, *names[:number])) if learns else (),
                            "max_evaluations": evaluations,
                            "max_tokens": search.max_tokens and math.ceil(share * search.max_tokens),
                            "budget_hours": search.budget_hours and share * search.budget_hours,
                        }
                    ),
                }
            )
            for number, (rate, name) in enumerate(zip(rates, names, strict=True))
        )

    @property
    def as_one_search(self) -> "Settings":
        """These settings, or for several rates, those of a search at the first rate with the evaluations of all."""
        parts = self.of_each_rate
        if len(parts) == 1:
            return parts[0]
        evaluations = sum(each.search.planned for each in parts)
        longer = {"max_evaluations": evaluations, "rounds": evaluations, "learn_from": self.search.learn_from}
        return parts[0].model_copy(update={"search": parts[0].search.model_copy(update=longer)})

    def _text(self, source: str, windows: int | None) -> TextSpec:
        return text_spec(source, windows, self.data.seqlen)

    def shown(self) -> dict[str, Any]:
        """Return all settings by section, as JSON has them: keys are masked, and so are passwords in URLs."""
        # Not model_dump_json, which raises an error for paths that are not UTF-8. Other values become text.
        text = json.dumps(self.model_dump(), default=str, ensure_ascii=False, indent=1)
        shown: dict[str, Any] = json.loads(Redaction(()).text(text.encode("utf-8", "replace").decode()))
        return shown

    @property
    def folder(self) -> Path:
        """The folder of this search."""
        return self.run.folder / self.search.name


def _others(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of other searches, each once."""
    return tuple(dict.fromkeys(other for other in names if other != name))


def setting_names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings; those of a list's items have `[]`, such as `llm.endpoints.[].model`."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name
            for item in get_args(field.annotation):
                if isinstance(item, type) and issubclass(item, BaseModel):
                    yield from setting_names(item, f"{prefix}{name}.[].")
