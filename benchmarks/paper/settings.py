"""What benchmarks/paper/__main__.py runs: a YAML file of its own form, which `selfpruner run` does not read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from benchmarks.paper.numbers import ABLATION_RATE, paper_model
from daemon.settings.errors import file_sentence, validation_sentence
from daemon.settings.section import Section
from daemon.settings.settings import Settings, setting_names
from daemon.settings.sources import load
from protocol.errors import SettingsError
from protocol.plans.spec import NAMED_TEXTS, Dtype, Reconstruction

ROOT = Path(__file__).parents[2]
"""The project's folder, which paths of searches' settings files are relative to."""
Method = Literal[
    "dense",
    "llm-pruner",
    "wanda-sp",
    "wanda-sp-any-heads",
    "wanda-sp-sequential",
    "owl",
    "self-pruner",
    "self-pruner-best",
]
SearchMethod = Literal["self-pruner", "self-pruner-best"]
Values = dict[str, Any]
"""Settings of `selfpruner run` by their dotted names."""
SELF, WIKITEXT2 = "self", "wikitext2"


def _rate(rate: float) -> float:
    rounded = round(rate, 5)
    if not 0 < rounded <= 0.9:
        raise ValueError("a pruning rate is above 0 and at most 0.9")
    return rounded


Rate = Annotated[float, AfterValidator(_rate)]


class Model(Section):
    """One model; in the file its name alone will do."""

    name: str = Field(min_length=1)
    """A hub name, a folder, or `smollm2`."""
    hub_name: str | None = None
    """Of a folder: the hub name of what is in it, where the paper's figures shall stand beside ours."""
    billions: PositiveFloat | None = None
    """Its parameters, for --estimate; where left out they come from finished runs, or from the name."""
    seqlen: int | None = Field(default=None, ge=16)
    """Tokens of a window for this model; none: as texts.seqlen."""

    @property
    def in_paper(self) -> str | None:
        """The paper's name of it."""
        return paper_model(self.hub_name or self.name)

    @property
    def title(self) -> str:
        """As tables call it."""
        return self.in_paper or Path(self.hub_name or self.name).name


class Texts(Section):
    """What is scored on, searched on and reported on: `wikitext2`, `c4`, `self`, or a text file."""

    calibration: str = "wikitext2"
    calibration_windows: PositiveInt = 128
    fitness: str = "wikitext2"
    fitness_windows: PositiveInt | None = None
    """None means the whole text."""
    report: str | None = "wikitext2"
    """What the tables hold; none: the fitness text, as in the paper."""
    report_windows: PositiveInt | None = None
    seqlen: int = Field(default=2048, ge=16)

    @model_validator(mode="after")
    def _is_finite(self) -> "Texts":
        whole = {"fitness": self.fitness_windows, "report": self.report_windows}
        for name, windows in whole.items():
            if getattr(self, name) == SELF and windows is None:
                raise ValueError(f"texts.{name} is `self`, which has no end: give texts.{name}_windows")
        return self


class Search(Section):
    """A search: a settings file of `selfpruner run`, and what is different from it."""

    config: Path
    set: Values = Field(default_factory=dict)


class Llm(Section):
    """A row of Table 4."""

    name: str
    """`gpt-3.5`, `gpt-4` and `gpt-4o` have the paper's figures beside them."""
    set: Values = Field(default_factory=dict)
    """Settings of the search; those of searches.self-pruner where left out, and then it is the same search."""


class ZeroShot(Section):
    """How `selfpruner zero-shot` asks."""

    limit: PositiveInt | None = None
    """Items of each task; none: all."""
    batch_size: PositiveInt = 8
    tasks_dir: Path | None = None
    """A folder of lm-eval task files in place of the paper's seven."""


class Finetune(Section):
    """How `selfpruner finetune` trains: LoRA with r = 8."""

    data: str = "alpaca-gpt4"
    examples: PositiveInt | None = 10_000
    epochs: PositiveInt = 2
    max_steps: PositiveInt | None = None
    batch: PositiveInt | None = None
    micro_batch: PositiveInt | None = None
    """Examples at once; fewer take less memory."""
    seqlen: int = Field(default=256, ge=16)


class Speed(Section):
    """How `selfpruner speed` measures."""

    flags: tuple[str, ...] = ()
    """Further flags, such as `--engine` and `vllm`."""


class PaperSettings(Section):
    """Which tables, of which models, by which methods, at which rates."""

    models: tuple[Model, ...] = Field(min_length=1)
    tables: tuple[Annotated[int, Field(ge=1, le=7)], ...] = (1,)
    rates: tuple[Rate, ...] = (0.2, 0.3, 0.4, 0.5)
    methods: tuple[Method, ...] = ("dense", "llm-pruner", "wanda-sp", "owl", "self-pruner")
    """Of Tables 1 and 2."""
    reconstruction: tuple[Reconstruction, ...] = Field(default=("none",), min_length=1)
    """Tables 1 and 2 have columns for each; the others are of the first."""
    texts: Texts = Texts()
    searches: dict[SearchMethod, Search] = Field(default_factory=dict)
    """By method; configs/paper.yaml and configs/best.yaml where left out, with this file's texts and reconstruction."""
    ablation_rate: Rate = ABLATION_RATE
    """Of Tables 3 and 4."""
    compared_rates: tuple[Rate, ...] = (0.3, 0.5)
    """Of Tables 5 and 6."""
    llms: tuple[Llm, ...] = (Llm(name="gpt-4o"),)
    zero_shot: ZeroShot | None = None
    """Without it no table has accuracies."""
    finetune: Finetune = Finetune()
    speed: Speed = Speed()
    dtype: Dtype = "bfloat16"
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _names_alone(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("models"), list):
            named = [{"name": each} if isinstance(each, str) else each for each in given["models"]]
            return given | {"models": named}
        return given

    @model_validator(mode="after")
    def _fits_together(self) -> "PaperSettings":
        if 2 in self.tables and self.zero_shot is None:
            raise ValueError("Table 2 is of zero-shot accuracies: give the section zero_shot")
        if 6 in self.tables and self.dtype == "float16":
            raise ValueError("Table 6 fine-tunes, and gradients overflow in float16: set dtype to bfloat16 or float32")
        if self.zero_shot is not None and self.texts.calibration == SELF:
            # Alone it is written in other windows than beside what a search is measured on.
            raise ValueError(
                "zero_shot scores models anew, on other text of their own: give no calibration text `self`"
            )
        texts = {self.texts.calibration, self.texts.fitness, self.texts.report}
        if 6 in self.tables and SELF in texts:
            # The fine-tuned folder would write another text than the dense model did.
            raise ValueError("Table 6 measures fine-tuned folders, which write texts of their own: give no text `self`")
        return self

    @property
    def reported(self) -> str:
        """The text that the tables' perplexities are of."""
        return self.texts.report or self.texts.fitness

    @property
    def is_papers_text(self) -> bool:
        """Whether the paper's perplexities, of WikiText-2, say anything beside ours. A file may be of it."""
        return self.reported not in set(NAMED_TEXTS) - {WIKITEXT2}

    @property
    def are_papers_tasks(self) -> bool:
        """Whether the paper's accuracies say anything beside ours."""
        return self.zero_shot is not None and self.zero_shot.tasks_dir is None

    @property
    def words(self) -> str:
        """What the perplexities are of, in a sentence."""
        texts, own = self.texts, [model for model in self.models if model.seqlen]
        shown, windows = (
            (texts.report, texts.report_windows) if texts.report else (texts.fitness, texts.fitness_windows)
        )
        count = "all" if windows is None else windows
        lengths = [f"{texts.seqlen:,}", *(f"{model.seqlen:,} for {model.title}" for model in own)]
        limit = self.zero_shot and self.zero_shot.limit
        asked = f" Accuracies of the first {limit} items of each task." if limit else ""
        papers = "" if self.reported in NAMED_TEXTS else " The paper's perplexities are of WikiText-2."
        return (
            f"Perplexity on {count} windows of {_name(shown)}, of {', '.join(lengths)} tokens; "
            f"scored on {texts.calibration_windows} windows of {_name(texts.calibration)}, "
            f"searched on {_name(texts.fitness)}; {self.dtype}.{asked}{papers}"
        )

    def search_of(self, method: SearchMethod) -> Search:
        """The search of a method."""
        usual = {"self-pruner": "configs/paper.yaml", "self-pruner-best": "configs/best.yaml"}
        return self.searches.get(method) or Search(config=Path(usual[method]))


def _name(text: str) -> str:
    """A file without its folders, which say nothing to others; a text of the hub as it is."""
    return Path(text).name if Path(text).is_file() else text


def read_settings(file: Path, overrides: Sequence[str] = ()) -> PaperSettings:
    """The settings of `file`, changed by `overrides` of the form `texts.fitness=VALUE`.

    Raises SettingsError, with one sentence, for whatever is wrong.
    """
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise TypeError(given)
    except (OSError, yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise SettingsError(file_sentence(file, error)) from None
    for override in overrides:
        _change(given, override)
    try:
        return PaperSettings.model_validate(given)
    except ValidationError as error:
        raise SettingsError(f"{file}: {validation_sentence(error, setting_names(PaperSettings))}") from None


def _change(given: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    *path, last = name.split(".")
    if not (equals and last):
        raise SettingsError(f"--set takes key=value, such as --set texts.seqlen=512, and not {override!r}")
    for part in path:
        if given.get(part) is None:
            given[part] = {}
        given = given[part]
        if not isinstance(given, dict):
            raise SettingsError(f"--set {name}: {part} has no parts with names")
    try:
        given[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date or a number that cannot be
        raise SettingsError(f"--set {name}: what is given is no YAML") from None


def settings_of_search(config: Path, overrides: Sequence[str]) -> Settings:
    """The settings that `selfpruner run` would have. Raises SettingsError where it would refuse them."""
    return load(ROOT / config, overrides)
