"""CellMaker: makes the cells that the tables need from the settings."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.paper import costs
from benchmarks.paper.answers import CellCommand
from benchmarks.paper.cells import Cell
from benchmarks.paper.settings import (
    ROOT,
    Method,
    Model,
    PaperSettings,
    SearchMethod,
    Values,
    settings_of_search,
)
from daemon.settings import file as setting_file
from daemon.settings.settings import Settings
from protocol.errors import SettingsError
from protocol.plans.spec import Reconstruction

ALLOCATIONS: dict[Method, tuple[str, str, str]] = {
    "llm-pruner": ("llm-pruner", "taylor", "dense"),
    "wanda-sp": ("uniform", "wanda-sp", "dense"),
    "wanda-sp-any-heads": ("uniform", "wanda-sp", "dense"),
    "wanda-sp-sequential": ("uniform", "wanda-sp", "sequential"),
    "owl": ("owl", "wanda-sp", "dense"),
    "mip": ("mip", "wanda-sp", "dense"),
}
"""Rates, importance and scoring of each method without a search. All use the split `equal`, as in the paper."""
MASKED: tuple[Method, ...] = ("wanda-sp-any-heads",)
"""Methods that may remove any query heads. Only `evaluate` supports them, so they have no accuracies."""
SEARCHES: tuple[SearchMethod, ...] = ("self-pruner", "self-pruner-best")
ABLATIONS: dict[str, Values] = {
    "w/o initialization": {"search.initializer": "random"},
    "w/o mutation": {"search.mutations": 0},
    "w/o crossover": {"search.crossovers": 0},
    "Self-Pruner": {},
}
"""Rows of Table 3, with the settings that they change."""


class CellMaker:
    """Makes the cells of one settings file. Raises SettingsError for a search with invalid settings."""

    def __init__(self, settings: PaperSettings) -> None:
        self.settings = settings

    def perplexity(self, model: Model, method: Method, rate: float, reconstruction: Reconstruction) -> Cell:
        """Return the cell that measures the perplexity of a model; `dense` has rate 0."""
        if method in SEARCHES:
            return self.search(model, method, rate, reconstruction)
        how, importance, sequential = [], "wanda-sp", False
        if method != "dense":
            how = [*self._choice(method, rate, reconstruction), *(["--heads", "any"] if method in MASKED else [])]
            importance, sequential = ALLOCATIONS[method][1], ALLOCATIONS[method][2] == "sequential"
        return Cell(
            what="evaluate",
            model=model.name,
            method=method,
            rate=rate,
            flags=("--model", model.name, *how, *self._texts(model), *self._numeric()),
            note=_noted(reconstruction) if how else "",
            tokens=costs.evaluation_tokens(
                self.settings.texts,
                self._seqlen(model),
                rate,
                importance=importance,
                sequential=sequential,
                fitted=reconstruction == "least-squares",
            ),
        )

    def search(
        self,
        model: Model,
        method: SearchMethod,
        rate: float,
        reconstruction: Reconstruction,
        changes: Values | None = None,
        note: str = "",
    ) -> Cell:
        """Return the cell of a search. `changes` override the method's settings, and `note` describes them."""
        chosen = self.settings.search_of(method)
        same = {**self._data(model, rate), "search.reconstruction": reconstruction}
        _refuse_others(f"searches.{method}", chosen.set, same)
        _refuse_others("llms", changes or {}, same)
        values = {**chosen.set, **same, **(changes or {})}
        if "api_key" in _names_in(values):
            raise SettingsError(
                "give keys of LLM endpoints as api_key_file: the settings of each run are written to files"
            )
        flags = [flag for name in sorted(values) for flag in ("--set", f"{name}={json.dumps(values[name])}")]
        settings, digest = _checked(chosen.config, tuple(flags[1::2]))
        return Cell(
            what="run",
            model=model.name,
            method=method,
            rate=rate,
            flags=tuple(flags),
            config=chosen.config,
            config_digest=digest,
            note=note or _noted(reconstruction),
            tokens=costs.search_tokens(settings),
        )

    def accuracy(self, model: Model, method: Method, rate: float, reconstruction: Reconstruction) -> Cell | None:
        """Return the zero-shot cell of a model pruned in memory; None if it has no accuracies."""
        if method in MASKED:
            return None
        if method in SEARCHES:
            return self.accuracy_of(model, self.search(model, method, rate, reconstruction))
        flags = list(self._questions())
        if method != "dense":
            flags += [*self._choice(method, rate, reconstruction), *self._calibration(model)]
            flags += ["--seed", str(self.settings.seed)]
        return self._asked(model, method, rate, flags, (), _noted(reconstruction) if method != "dense" else "")

    def accuracy_of(self, model: Model, made_by: Cell) -> Cell | None:
        """Return the zero-shot cell of another cell's result: a search's best, or a fine-tuned folder."""
        flags = list(self._questions())
        if made_by.what == "run":
            flags += [*self._calibration(model), "--seed", str(self.settings.seed)]
        return self._asked(model, made_by.method, made_by.rate, flags, (made_by,), made_by.note)

    def exported(self, model: Model, rate: float) -> Cell:
        """Return the cell that exports the best candidate of Self-Pruner's search."""
        search = self.search(model, "self-pruner", rate, self.settings.reconstruction[0])
        fitted = self.settings.reconstruction[0] == "least-squares"
        tokens = costs.evaluation_tokens(self.settings.texts, self._seqlen(model), rate, fitted=fitted)
        return self._of(search, "export", (), tokens)

    def finetuned(self, model: Model, rate: float, *, distils: bool = False) -> Cell:
        """Return the cell that fine-tunes the model of `exported` with LoRA, on data or on predictions."""
        chosen = self.settings.finetune
        given = {
            "--data": chosen.data,
            "--examples": chosen.examples,
            "--epochs": chosen.epochs,
            "--max-steps": chosen.max_steps,
            "--batch": chosen.batch,
            "--micro-batch": chosen.micro_batch,
            "--seqlen": chosen.seqlen,
            "--seed": self.settings.seed,
        }
        flags = [part for name, value in given.items() if value is not None for part in (name, str(value))]
        flags += ["--distil", model.name] if distils else []
        tokens = costs.finetune_tokens(self.settings, rate, distils=distils)
        note = "after distillation" if distils else "after LoRA"
        return self._of(self.exported(model, rate), "finetune", flags, tokens, note)

    def measured_folder(self, model: Model, folder: Cell) -> Cell:
        """Return the cell that measures the perplexity of a folder, on the same tokens as all other cells."""
        tokens = costs.evaluation_tokens(self.settings.texts, self._seqlen(model), 0.0, fitted=False)
        return self._of(folder, "evaluate", (*self._texts(model), *self._numeric()), tokens * (1 - folder.rate))

    def speed(self, model: Model, rate: float) -> Cell:
        """Return the cell that measures the tokens per second of the model of `exported` and of the dense model."""
        own = self.settings.speed.flags
        is_said = any(flag.partition("=")[0] == "--dtype" for flag in own)
        flags = ("--baseline", model.name, *(() if is_said else ("--dtype", self.settings.dtype)), *own)
        cell = self._of(self.exported(model, rate), "speed", flags, costs.speed_tokens(rate, own))
        return cell.model_copy(update={"loads": costs.speed_loads(rate, own)})

    def _of(self, made_by: Cell, what: CellCommand, flags: Iterable[str], tokens: float, note: str = "") -> Cell:
        return Cell(
            what=what,
            model=made_by.model,
            method=made_by.method,
            rate=made_by.rate,
            flags=tuple(flags),
            needs=(made_by,),
            note=note or made_by.note,
            tokens=tokens,
        )

    def _asked(
        self, model: Model, method: str, rate: float, flags: list[str], needs: tuple[Cell, ...], note: str
    ) -> Cell | None:
        if self.settings.zero_shot is None:
            return None
        tokens = costs.zero_shot_tokens(self.settings.zero_shot.limit, rate)
        return Cell(
            what="zero-shot",
            model=model.name,
            method=method,
            rate=rate,
            flags=(*flags, "--dtype", self.settings.dtype),
            needs=needs,
            note=note,
            tokens=tokens,
        )

    def _choice(self, method: Method, rate: float, reconstruction: Reconstruction) -> list[str]:
        rates, importance, scoring = ALLOCATIONS[method]
        flags = ["--allocate", rates, "--rate", f"{rate:g}", "--importance", importance, "--scoring", scoring]
        return [*flags, "--reconstruction", reconstruction]

    def _questions(self) -> Iterator[str]:
        chosen = self.settings.zero_shot
        if chosen is not None:
            yield from ("--batch-size", str(chosen.batch_size))
            yield from ("--limit", str(chosen.limit)) if chosen.limit else ()
            yield from ("--tasks-dir", str(chosen.tasks_dir)) if chosen.tasks_dir else ()

    def _calibration(self, model: Model) -> list[str]:
        texts = self.settings.texts
        flags = ["--calibration-data", texts.calibration, "--calibration-windows", str(texts.calibration_windows)]
        return [*flags, "--seqlen", str(self._seqlen(model))]

    def _texts(self, model: Model) -> list[str]:
        texts = self.settings.texts
        flags = ["--data", texts.fitness, *self._calibration(model)]
        flags += ["--windows", str(texts.fitness_windows)] if texts.fitness_windows else []
        if texts.report:
            flags += ["--report-data", texts.report]
            flags += ["--report-windows", str(texts.report_windows)] if texts.report_windows else []
        return flags

    def _numeric(self) -> list[str]:
        return ["--dtype", self.settings.dtype, "--seed", str(self.settings.seed)]

    def _data(self, model: Model, rate: float) -> Values:
        texts = self.settings.texts.model_dump() | {"seqlen": self._seqlen(model)}
        target = {"target.model": model.name, "target.rate": rate, "target.dtype": self.settings.dtype}
        return {f"data.{name}": value for name, value in texts.items()} | target | {"search.seed": self.settings.seed}

    def _seqlen(self, model: Model) -> int:
        return model.seqlen or self.settings.texts.seqlen


def settings_of(cell: Cell) -> Settings:
    """Return the settings of a search's cell."""
    assert cell.config is not None
    return _checked(cell.config, cell.flags[1::2])[0]


def _noted(reconstruction: Reconstruction) -> str:
    return "" if reconstruction == "none" else reconstruction


def _refuse_others(where: str, given: Values, same: Mapping[str, Any]) -> None:
    """Raise SettingsError if `given` sets a search's name or folder, or a different value for a name in `same`."""
    for name, value in given.items():
        if "." not in name:
            raise SettingsError(f"{where}: give {name!r} as dotted names, such as search.rounds")
        if name in ("search.name", "run.folder"):
            raise SettingsError(f"{where} cannot set {name}: every search has its own name and folder")
        if name in same and same[name] != value:
            raise SettingsError(
                f"{where} cannot set {name}: models, rates, texts, reconstruction, dtype and seed are the same for "
                "every method and have their own settings"
            )


def _names_in(values: object) -> set[str]:
    """Return all keys at any depth. Of a dotted name, only the last part is returned."""
    if isinstance(values, dict):
        return {str(name).rpartition(".")[2] for name in values}.union(*map(_names_in, values.values()))
    return set().union(*map(_names_in, values)) if isinstance(values, list) else set()


@cache
def _checked(config: Path, overrides: tuple[str, ...]) -> tuple[Settings, str]:
    """Return the settings of a search, and a digest of its file without comments. Raises SettingsError."""
    settings = settings_of_search(config, overrides)
    said = json.dumps(setting_file.read(ROOT / config), sort_keys=True, default=str)
    return settings, hashlib.sha256(said.encode()).hexdigest()[:16]
