"""SearchSpec: everything that decides what a candidate measures, and its fingerprint."""

import hashlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from protocol.plans.plan import Plan, Split, feasible_rates, make_plan
from protocol.plans.shape import Granularity, ModelShape

Importance = Literal["wanda-sp", "taylor", "magnitude", "obs"]
"""How heads and channels are scored: as FLAP's Wanda-sp, as LLM-Pruner, by the size of their weights, or (optimal brain
surgeon) by what it costs to do without them where the rest makes up for it."""
Scoring = Literal["dense", "sequential"]
"""Once on the dense model, or for each plan anew, each layer on the already pruned layers below it (Wanda-sp only)."""
Reconstruction = Literal["none", "least-squares"]
"""Whether what stays of o_proj and down_proj is fitted to what they computed before, on the calibration text."""
Dtype = Literal["bfloat16", "float32", "float16"]
Measure = Literal["perplexity", "kl"]
"""What a search minimises: perplexity (the paper), or the KL divergence from the dense model."""


Role = Literal["calibration", "fitness", "report"]
"""What a text is for: scored on, searched on, reported on."""


NAMED_TEXTS = ("wikitext2", "c4", "self")
"""Texts that are no files: two of the hub, and what the dense model writes itself."""


class TextSpec(BaseModel):
    """A text cut into windows of tokens. `windows` None means every whole window of the text, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """`wikitext2`, `c4`, `self`, or the path of a text file."""
    windows: PositiveInt | None
    seqlen: int = Field(ge=2)

    @property
    def place(self) -> str:
        """Equal for texts that are one: a name as it is, a file as the absolute path that it is found by here."""
        return self.source if self.source in NAMED_TEXTS else str(Path(self.source).expanduser().resolve())


def numbered(texts: Mapping[Role, Hashable]) -> dict[Role, int]:
    """A number for each role: the same for those of equal `texts`."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts.values()))}
    return {role: numbers[text] for role, text in texts.items()}


class SearchSpec(BaseModel):
    """What is pruned, how far, and what it is measured on. Two searches with equal specs measure the same numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """A hub name, a folder, or `smollm2`."""
    rate: float = Field(gt=0, le=0.9)
    granularity: Granularity = "layer"
    split: Split = "equal"
    lowest_rate: float = Field(default=0.0, ge=0, lt=1)
    highest_rate: float = Field(default=0.95, gt=0, lt=1)
    multiple_of: PositiveInt = 1
    importance: Importance = "wanda-sp"
    scoring: Scoring = "dense"
    reconstruction: Reconstruction = "none"
    calibration: TextSpec
    fitness: TextSpec
    measure: Measure = "perplexity"
    """`kl` measures the divergence beside the perplexity, on every text."""
    report: TextSpec | None = None
    dtype: Dtype = "bfloat16"
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _scoring_fits(self) -> "SearchSpec":
        if self.scoring == "sequential" and self.importance != "wanda-sp":
            raise ValueError(f"scoring `sequential` is for the importance `wanda-sp`, not for {self.importance!r}")
        return self

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change whenever anything here does."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def texts(self) -> dict[Role, TextSpec]:
        """The texts by role, in the order in which they take their windows."""
        texts: dict[Role, TextSpec] = {"calibration": self.calibration, "fitness": self.fitness}
        return texts if self.report is None else {**texts, "report": self.report}

    @property
    def text_numbers(self) -> dict[Role, int]:
        """Which roles take their windows from one text: those with the same number."""
        return numbered({role: text.place for role, text in self.texts.items()})

    def feasible(self, rates: "tuple[float, ...] | list[float]", shape: ModelShape) -> tuple[float, ...]:
        """The feasible pruning rates of this search nearest to `rates` (one per unit)."""
        return feasible_rates(
            rates, shape, self.rate, granularity=self.granularity, low=self.lowest_rate, high=self.highest_rate
        )

    def plan(self, rates: "tuple[float, ...] | list[float]", shape: ModelShape) -> Plan:
        """The plan that these feasible rates become on a model of this `shape`."""
        return make_plan(rates, shape, granularity=self.granularity, split=self.split, multiple_of=self.multiple_of)

    def uniform_rates(self, shape: ModelShape) -> tuple[float, ...]:
        """The rate of this search for every unit."""
        return self.feasible([self.rate] * len(shape.units(self.granularity)), shape)

    def uniform_plan(self, shape: ModelShape) -> Plan:
        """The allocation every method is compared with: the same rate for all layers, equal split, as Wanda-sp does."""
        uniform = feasible_rates([self.rate] * len(shape.layers), shape, self.rate, granularity="layer")
        return make_plan(uniform, shape, granularity="layer", split="equal", multiple_of=self.multiple_of)
