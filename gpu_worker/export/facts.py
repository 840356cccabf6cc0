"""The facts that an exported folder records: its origin, how it was pruned, and what was measured."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from protocol.errors import ModelError
from protocol.plans.plan import Parameters, Plan, count_parameters
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Role, SearchSpec, TextSpec
from protocol.results.commands import GgufPerplexity, SearchSummary
from protocol.results.finetuning import Finetuning
from protocol.results.formats import FACTS, SEARCH_CHARTS

SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Name of `smollm2` on the hub."""
MAX_CHART_BYTES = 2_000_000
"""Largest chart that is read from a folder; one of 60 units has 18 kB."""
NOT_FACTS = ("selfpruner", "format", "formats", "parameters")
"""Keys of selfpruner.json that are not facts."""


class TextPerplexity(BaseModel):
    """Perplexity of one model on one text, and the number of predicted tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    perplexity: PositiveFloat
    tokens: PositiveInt
    kl: NonNegativeFloat | None = None
    """KL divergence from the dense model in nats per token, if measured."""


class ExportFacts(BaseModel):
    """The facts in the model card and in `selfpruner.json`. Figures that were not measured are None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str
    """A hub name, a folder, or `smollm2`."""
    method: str
    """Where the rates come from: the name of a search, or of an allocation such as `uniform`."""
    rates: tuple[float, ...]
    """Pruning rates, one per unit of the spec's granularity, in order."""
    spec: SearchSpec
    text_numbers: dict[Role, int]
    """Roles with the same number took their windows from the same text. File names without folders would not show
    this."""
    shape: ModelShape
    """Shape of the dense model."""
    plan: Plan
    dense: TextPerplexity | None = None
    """Dense perplexity on the fitness text."""
    pruned: TextPerplexity | None = None
    dense_report: TextPerplexity | None = None
    """Dense perplexity on the report text, which the search did not use, if the spec has a report text."""
    pruned_report: TextPerplexity | None = None
    fitness_digest: str | None = None
    """Digest of the fitness text's tokens, which shows whether a later measurement uses the same tokens."""
    report_digest: str | None = None
    begins_with_bos: bool = False
    """Whether the first token of every window was replaced by bos."""
    gguf: GgufPerplexity | None = None
    """Perplexity of the GGUF file in llama.cpp."""
    searched: SearchSummary | None = None
    """The search that found the rates, if the command that wrote the folder had its record."""
    finetunings: tuple[Finetuning, ...] = ()
    """Fine-tunings after pruning, in order. If there are any, `pruned` was measured after the last fine-tuning."""

    @model_validator(mode="after")
    def _belong_together(self) -> "ExportFacts":
        units = len(self.shape.units(self.spec.granularity))
        if len(self.rates) != units:
            raise ValueError(f"{len(self.rates)} rates for {units} units")
        if len(self.plan.layers) != len(self.shape.layers):
            raise ValueError(f"a plan for {len(self.plan.layers)} layers of {len(self.shape.layers)}")
        return self

    def is_one_text(self, one: Role, other: Role) -> bool:
        """Return whether both roles took their windows from the same text."""
        return one in self.text_numbers and self.text_numbers[one] == self.text_numbers.get(other)

    @property
    def parameters(self) -> Parameters:
        """Return the parameters before and after pruning."""
        return count_parameters(self.plan, self.shape)

    @property
    def hub_name(self) -> str | None:
        """Return the base model's name on the Hugging Face Hub; None for a folder."""
        if self.base_model == "smollm2":
            return SMOLLM2_ON_THE_HUB
        is_name = self.base_model.count("/") == 1 and not self.base_model.startswith((".", "/", "~"))
        is_file = self.base_model.endswith(".gguf") or Path(self.base_model).exists()
        return self.base_model if is_name and not is_file else None

    @property
    def base_name(self) -> str:
        """Return the base model's name for the card. A folder is named without its parents, which are private."""
        return self.hub_name or Path(self.base_model).expanduser().resolve().name


def read_facts(folder: Path) -> ExportFacts:
    """Read the facts of an exported folder. Raises ModelError if its file does not hold facts."""
    file = folder / FACTS
    try:
        written = json.loads(file.read_bytes())
        facts = ExportFacts.model_validate({name: each for name, each in written.items() if name not in NOT_FACTS})
        if facts.searched is None:
            return facts
        return facts.model_copy(update={"searched": facts.searched.model_copy(update={"charts": _charts(folder)})})
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        # pydantic's ValidationError is a ValueError with a very long message
        reason = "not what this version writes" if isinstance(error, ValidationError) else str(error)
        raise ModelError(f"{file} does not say what the folder holds ({reason})") from error


def without_folders(spec: SearchSpec) -> SearchSpec:
    """Return the spec without the folders of file names, because they are private and differ between machines."""
    names: dict[str, TextSpec] = {
        role: text.model_copy(update={"source": Path(text.source).name}) for role, text in spec.texts.items()
    }
    return spec.model_copy(update=names)


def version_of_selfpruner() -> str:
    """Return the installed version, or `unknown` if the package is not installed."""
    try:
        return version("self-pruner")
    except PackageNotFoundError:
        return "unknown"


def _charts(folder: Path) -> dict[str, str]:
    """Return the charts of an exported folder. A link is not followed, and a file that is no chart is left out."""
    found = {}
    for name in SEARCH_CHARTS:
        file = folder / name
        try:
            if not file.is_symlink() and file.stat().st_size <= MAX_CHART_BYTES:
                found[name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    return found
