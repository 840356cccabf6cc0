"""The settings file of benchmarks.paper: a YAML file with its own format, different from that of `selfpruner run`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from benchmarks.paper.paper_figures import ABLATION_RATE, paper_model
from daemon.settings import file as setting_file
from daemon.settings.errors import validation_sentence
from daemon.settings.section import Section
from daemon.settings.settings import Settings, setting_names
from daemon.settings.sources import load
from daemon.settings.target import DataSettings
from protocol.errors import SettingsError
from protocol.plans.spec import NAMED_TEXTS, Dtype, Reconstruction

ROOT = Path(__file__).parents[2]
"""The project's folder, to which the paths of searches' settings files are relative."""
Method = Literal[
    "dense",
    "llm-pruner",
    "wanda-sp",
    "wanda-sp-any-heads",
    "wanda-sp-sequential",
    "owl",
    "mip",
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
        raise ValueError("a pruning rate must be above 0 and at most 0.9")
    return rounded


Rate = Annotated[float, AfterValidator(_rate)]


class Model(Section):
    """One model. In the file, its name alone is enough."""

    name: str = Field(min_length=1)
    """A hub name, a folder, or `smollm2`."""
    hub_name: str | None = None
    """For a folder: the hub name of its model, to show the paper's figures beside ours."""
    billions: PositiveFloat | None = None
    """Billions of parameters, for --estimate. By default they come from finished runs, or from the name."""
    seqlen: int | None = Field(default=None, ge=16)
    """Tokens per window for this model; default: texts.seqlen."""

    @property
    def in_paper(self) -> str | None:
        """The model's name in the paper; None if the paper does not have it."""
        return paper_model(self.hub_name or self.name)

    @property
    def title(self) -> str:
        """The model's name in tables."""
        return self.in_paper or Path(self.hub_name or self.name).name


class Texts(DataSettings):
    """The texts for scoring weights, for the search and for the tables."""

    report: str | None = "wikitext2"
    """The text of the perplexities in the tables; none means the fitness text, as in the paper."""

    @model_validator(mode="after")
    def _is_finite(self) -> "Texts":
        whole = {"fitness": self.fitness_windows, "report": self.report_windows}
        for name, windows in whole.items():
            if getattr(self, name) == SELF and windows is None:
                raise ValueError(f"texts.{name} is `self`, which is unlimited: set texts.{name}_windows")
        return self


class Search(Section):
    """A search: a settings file of `selfpruner run`, and settings that override it."""

    config: Path
    set: Values = Field(default_factory=dict)


class Llm(Section):
    """A row of Table 4."""

    name: str
    """`gpt-3.5`, `gpt-4` and `gpt-4o` have the paper's figures beside them."""
    set: Values = Field(default_factory=dict)
    """Settings of the search. By default the row shows the search of searches.self-pruner itself."""


class ZeroShot(Section):
    """Options of `selfpruner zero-shot`."""

    limit: PositiveInt | None = None
    """Maximum items of each task; none means all."""
    batch_size: PositiveInt = 8
    tasks_dir: Path | None = None
    """A folder of lm-eval task files to use instead of the paper's seven tasks."""


class Finetune(Section):
    """Options of `selfpruner finetune`, which trains LoRA with r = 8."""

    data: str = "alpaca-gpt4"
    examples: PositiveInt | None = 10_000
    epochs: PositiveInt = 2
    max_steps: PositiveInt | None = None
    batch: PositiveInt | None = None
    micro_batch: PositiveInt | None = None
    """Examples per forward pass; fewer need less memory."""
    seqlen: int = Field(default=256, ge=16)
    distil: bool = False
    """Whether Table 6 also has the model after distillation, which loads the dense model beside it."""


class Speed(Section):
    """Options of `selfpruner speed`."""

    flags: tuple[str, ...] = ()
    """Additional flags, such as `--engine` and `vllm`."""


class PaperSettings(Section):
    """The tables to make, with their models, methods, rates and texts."""

    models: tuple[Model, ...] = Field(min_length=1)
    tables: tuple[Annotated[int, Field(ge=1, le=7)], ...] = (1,)
    rates: tuple[Rate, ...] = (0.2, 0.3, 0.4, 0.5)
    methods: tuple[Method, ...] = ("dense", "llm-pruner", "wanda-sp", "owl", "self-pruner")
    """The methods of Tables 1 and 2."""
    reconstruction: tuple[Reconstruction, ...] = Field(default=("none",), min_length=1)
    """Tables 1 and 2 have columns for each of these; the other tables use the first."""
    texts: Texts = Texts()
    searches: dict[SearchMethod, Search] = Field(default_factory=dict)
    """Search of each method. The defaults are configs/paper.yaml and configs/best.yaml. Texts and reconstruction always
    come from this file."""
    ablation_rate: Rate = ABLATION_RATE
    """The rate of Tables 3 and 4."""
    compared_rates: tuple[Rate, ...] = (0.3, 0.5)
    """The rates of Tables 5 and 6."""
    llms: tuple[Llm, ...] = (Llm(name="gpt-4o"),)
    zero_shot: ZeroShot | None = None
    """Without this section no table has accuracies."""
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
            raise ValueError("Table 2 has zero-shot accuracies: add the section zero_shot")
        if 6 in self.tables and self.dtype == "float16":
            raise ValueError("Table 6 fine-tunes, and gradients overflow in float16: set dtype to bfloat16 or float32")
        if self.zero_shot is not None and self.texts.calibration == SELF:
            # The windows of `self` depend on the other texts that the model generates in the same run.
            raise ValueError(
                "zero_shot would score models on a different generated text: do not use the calibration text `self`"
            )
        texts = {self.texts.calibration, self.texts.fitness, self.texts.report}
        if 6 in self.tables and SELF in texts:
            # The fine-tuned model would generate a different text than the dense model.
            raise ValueError(
                "Table 6 measures fine-tuned models, which generate different texts: do not use the text `self`"
            )
        return self

    @property
    def reported(self) -> str:
        """The text of the tables' perplexities."""
        return self.texts.report or self.texts.fitness

    @property
    def is_papers_text(self) -> bool:
        """Whether our perplexities can be compared with the paper's on WikiText-2. A file is assumed to contain it."""
        return self.reported not in set(NAMED_TEXTS) - {WIKITEXT2}

    @property
    def are_papers_tasks(self) -> bool:
        """Whether our accuracies are comparable with the paper's."""
        return self.zero_shot is not None and self.zero_shot.tasks_dir is None

    @property
    def description(self) -> str:
        """A sentence about the texts and windows of the perplexities."""
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
        """Return the search of a method."""
        usual = {"self-pruner": "configs/paper.yaml", "self-pruner-best": "configs/best.yaml"}
        return self.searches.get(method) or Search(config=Path(usual[method]))


def _name(text: str) -> str:
    """Return the name of a text; for a file, without its folders."""
    return Path(text).name if Path(text).is_file() else text


def read_settings(file: Path, overrides: Sequence[str] = ()) -> PaperSettings:
    """Return the settings of `file`, changed by `overrides` of the form `texts.fitness=VALUE`.

    Raises SettingsError, with one sentence, if they are invalid.
    """
    given = setting_file.read(file)
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
        raise SettingsError(f"--set takes key=value, such as --set texts.seqlen=512, not {override!r}")
    for part in path:
        if given.get(part) is None:
            given[part] = {}
        given = given[part]
        if not isinstance(given, dict):
            raise SettingsError(f"--set {name}: {part} is not a section")
    try:
        given[last] = setting_file.parsed(text)
    except yaml.YAMLError:
        raise SettingsError(f"--set {name}: the value is not valid YAML") from None


def settings_of_search(config: Path, overrides: Sequence[str]) -> Settings:
    """Return the settings that `selfpruner run` would use. Raises SettingsError if it would reject them."""
    return load(ROOT / config, overrides)
