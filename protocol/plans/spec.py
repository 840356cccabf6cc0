"""SearchSpec: all settings that determine how a candidate is measured, and their fingerprint."""

import hashlib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from protocol.plans.plan import Plan, Split, feasible_rates, make_plan
from protocol.plans.rates import TargetRate
from protocol.plans.shape import Granularity, ModelShape
from protocol.plans.value import Value

Importance = Literal["wanda-sp", "taylor", "magnitude", "obs"]
"""How heads and channels are scored: FLAP's Wanda-sp, LLM-Pruner's Taylor score, the magnitude of the weights, or the
optimal brain surgeon (the loss after the remaining weights have been adjusted)."""
Scoring = Literal["dense", "sequential"]
"""`dense` scores once, on the dense model. `sequential` scores each plan anew, each layer on the activations of the
already pruned layers below it (Wanda-sp only)."""
Reconstruction = Literal["none", "least-squares"]
"""Whether the remaining weights of o_proj and down_proj are fitted to the dense outputs, on the calibration text."""
Dtype = Literal["bfloat16", "float32", "float16"]
Measure = Literal["perplexity", "kl"]
"""The fitness of a search: perplexity (the paper), or the KL divergence from the dense model."""


Role = Literal["calibration", "fitness", "report"]
"""The purpose of a text: scoring weights, guiding the search, or the final figures."""


NAMED_TEXTS = ("wikitext2", "c4", "self")
"""Texts that are not files: two from the hub, and the text that the dense model generates."""


def is_examples(source: str) -> bool:
    """Return whether a text is a file of examples, each a prompt with an answer."""
    return Path(source).suffix.lower() in (".json", ".jsonl")


class TextSpec(Value):
    """A text cut into windows of `seqlen` tokens. `windows` None means all whole windows, in order.

    A file of examples has a window for each of them.
    """

    source: str
    """`wikitext2`, `c4`, `self`, or the path of a text file, or of a file of examples."""
    windows: PositiveInt | None
    seqlen: int = Field(ge=2)

    @property
    def place(self) -> str:
        """The name of the text, or the absolute path of its file on this machine; equal for the same text."""
        return self.source if self.source in NAMED_TEXTS else str(Path(self.source).expanduser().resolve())


def windows_in_words(texts: Mapping[Role, TextSpec]) -> str:
    """Describe the windows that a text is too short for, and what to do."""
    each = [
        f"{role}: {'all other' if text.windows is None else f'{text.windows:,}'} windows of {text.seqlen:,}"
        for role, text in texts.items()
    ]
    return f"({', '.join(each)}); ask for fewer or shorter windows, or give a longer text"


def number_texts(texts: Mapping[Role, Hashable]) -> dict[Role, int]:
    """Return a number for each role; roles with equal `texts` have the same number."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts.values()))}
    return {role: numbers[text] for role, text in texts.items()}


MEASURE_NAMES: dict[Measure, str] = {"perplexity": "perplexity", "kl": "KL divergence"}
FIGURE_DIGITS: dict[Measure, int] = {"perplexity": 2, "kl": 4}
"""Decimals that distinguish candidates: perplexities are in the tens, divergences are rarely above one."""


class SearchSpec(Value):
    """The model, how it is pruned, and the texts it is measured on. Searches with equal specs measure equal numbers."""

    model: str
    """A hub name, a folder, or `smollm2`."""
    rate: TargetRate
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
    """`kl` measures the divergence in addition to the perplexity, on every text."""
    report: TextSpec | None = None
    dtype: Dtype = "bfloat16"
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _scoring_fits(self) -> "SearchSpec":
        if self.scoring == "sequential" and self.importance != "wanda-sp":
            raise ValueError(f"scoring `sequential` needs the importance `wanda-sp`, not {self.importance!r}")
        return self

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits, a hash of all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def texts(self) -> dict[Role, TextSpec]:
        """The texts by role, in the order in which windows are taken."""
        texts: dict[Role, TextSpec] = {"calibration": self.calibration, "fitness": self.fitness}
        return texts if self.report is None else {**texts, "report": self.report}

    @property
    def text_numbers(self) -> dict[Role, int]:
        """A number for each role; roles that take their windows from the same text have the same number."""
        return number_texts({role: text.place for role, text in self.texts.items()})

    def feasible(self, rates: "tuple[float, ...] | list[float]", shape: ModelShape) -> tuple[float, ...]:
        """Return the feasible pruning rates of this search nearest to `rates` (one per unit)."""
        return feasible_rates(
            rates, shape, self.rate, granularity=self.granularity, low=self.lowest_rate, high=self.highest_rate
        )

    def plan(self, rates: "tuple[float, ...] | list[float]", shape: ModelShape) -> Plan:
        """Return the plan of these feasible rates on a model of this `shape`."""
        return make_plan(rates, shape, granularity=self.granularity, split=self.split, multiple_of=self.multiple_of)

    def uniform_rates(self, shape: ModelShape) -> tuple[float, ...]:
        """Return this search's rate for every unit."""
        return self.feasible([self.rate] * len(shape.units(self.granularity)), shape)

    def uniform_plan(self, shape: ModelShape) -> Plan:
        """Return the plan of the uniform baseline: the same rate for all layers, equal split, as in Wanda-sp."""
        uniform = feasible_rates([self.rate] * len(shape.layers), shape, self.rate, granularity="layer")
        return make_plan(uniform, shape, granularity="layer", split="equal", multiple_of=self.multiple_of)
