"""What an exported folder says of itself: where it comes from, what was removed and how, and what was measured."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from protocol.plans.plan import Parameters, Plan, count_parameters
from protocol.plans.shape import ModelShape
from protocol.plans.spec import Role, SearchSpec, TextSpec, numbered
from protocol.results.commands import GgufPerplexity, Searched
from protocol.results.finetuning import Finetuning

SMOLLM2_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""What `smollm2` is called there."""


class TextPerplexity(BaseModel):
    """Perplexity of one model on one text, and the number of predicted tokens that it was averaged over."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    perplexity: PositiveFloat
    tokens: PositiveInt
    kl: NonNegativeFloat | None = None
    """Divergence from the dense model in nats, where it was measured."""


class ExportFacts(BaseModel):
    """What the model card and `selfpruner.json` say. What was not measured is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str
    """A hub name, a folder, or `smollm2`."""
    method: str
    """Where the rates come from: the name of a search, or of an allocation such as `uniform`."""
    rates: tuple[float, ...]
    """One per unit of the spec's granularity, in order."""
    spec: SearchSpec
    text_numbers: dict[Role, int] | None = None
    """Roles with the same number took their windows from one text, which names without folders do not tell. None in
    folders that do not say so: texts of one name count as one."""
    shape: ModelShape
    """Of the dense model."""
    plan: Plan
    dense: TextPerplexity | None = None
    """On the fitness text."""
    pruned: TextPerplexity | None = None
    dense_report: TextPerplexity | None = None
    """On the text that rates were not searched on, where the spec has one."""
    pruned_report: TextPerplexity | None = None
    fitness_digest: str | None = None
    """Of the fitness text's tokens: who measures again can tell whether they are the same."""
    report_digest: str | None = None
    begins_with_bos: bool = False
    """Whether every window's first token was replaced by bos."""
    gguf: GgufPerplexity | None = None
    """Of the GGUF file, in llama.cpp."""
    searched: Searched | None = None
    """Of rates that were searched for by the command that wrote the folder."""
    finetunings: tuple[Finetuning, ...] = ()
    """What was done after pruning, in order; then `pruned` is what the model measures after all of it."""

    @model_validator(mode="after")
    def _belong_together(self) -> "ExportFacts":
        units = len(self.shape.units(self.spec.granularity))
        if len(self.rates) != units:
            raise ValueError(f"{len(self.rates)} rates for {units} units")
        if len(self.plan.layers) != len(self.shape.layers):
            raise ValueError(f"a plan for {len(self.plan.layers)} layers of {len(self.shape.layers)}")
        return self

    def is_one_text(self, one: Role, other: Role) -> bool:
        """Whether both roles took their windows from one text."""
        numbers = self.text_numbers or numbered({role: text.source for role, text in self.spec.texts.items()})
        return one in numbers and numbers.get(one) == numbers.get(other)

    @property
    def parameters(self) -> Parameters:
        """Parameters before and after pruning."""
        return count_parameters(self.plan, self.shape)

    @property
    def hub_name(self) -> str | None:
        """The base model's name on the Hugging Face hub; None for a folder."""
        if self.base_model == "smollm2":
            return SMOLLM2_ON_THE_HUB
        is_name = self.base_model.count("/") == 1 and not self.base_model.startswith((".", "/", "~"))
        is_file = self.base_model.endswith(".gguf") or Path(self.base_model).exists()
        return self.base_model if is_name and not is_file else None

    @property
    def base_name(self) -> str:
        """The base model as the card calls it: a folder by its last part, whose place is nobody's business."""
        return self.hub_name or Path(self.base_model).expanduser().resolve().name


def without_folders(spec: SearchSpec) -> SearchSpec:
    """The spec with the last part of paths only: where files lie is nobody's business, and differs elsewhere."""
    names: dict[str, TextSpec] = {
        role: text.model_copy(update={"source": Path(text.source).name}) for role, text in spec.texts.items()
    }
    return spec.model_copy(update=names)


def version_of_selfpruner() -> str:
    """The installed version, or `unknown` where the code runs without being installed."""
    try:
        return version("self-pruner")
    except PackageNotFoundError:
        return "unknown"
