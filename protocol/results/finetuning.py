"""How a pruned model is fine-tuned, and what its folder says of that afterwards."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from protocol.plans.spec import TextSpec

ALPACA_GPT4 = "alpaca-gpt4"
"""The name of the instructions that the paper fine-tunes on; they come from the hub."""
HUB_EXAMPLES = 10_000
"""So many of them, as in the paper."""
Method = Literal["lora", "full"]
"""Low-rank additions to the seven projections of each decoder layer, or all of these projections' own weights."""
Form = Literal["alpaca", "text"]
"""Instructions with answers, of which the answers are predicted; or plain text, all of which is."""
Schedule = Literal["cosine", "linear", "constant"]


def form_of(source: str) -> Form:
    """What data is taken for: ALPACA_GPT4 and files that end in .json or .jsonl are instructions, all else is text."""
    is_alpaca = source == ALPACA_GPT4 or Path(source).suffix.lower() in (".json", ".jsonl")
    return "alpaca" if is_alpaca else "text"


class Recipe(BaseModel):
    """All that decides what fine-tuning makes of a model and its data."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method = "lora"
    rank: PositiveInt = 8
    """LoRA's r."""
    alpha: PositiveFloat = 16.0
    """What LoRA adds is scaled by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Of what goes into LoRA's additions."""
    learning_rate: PositiveFloat = 3e-4
    """The highest."""
    schedule: Schedule = "cosine"
    """How the learning rate falls to nought after the warm-up."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """The share of all steps in which it rises."""
    epochs: PositiveInt = 2
    max_steps: PositiveInt | None = None
    """Fewer steps than the epochs have; the schedule is that of the steps that are made."""
    batch: PositiveInt = 64
    """Examples, or windows of a text, in one step."""
    micro_batch: PositiveInt = 4
    """How many of them go through the model at once."""
    seqlen: int = Field(default=256, ge=16)
    """Tokens of the longest example; longer ones are cut. Tokens of a text's windows."""
    examples: PositiveInt | None = None
    """So many, by a seeded shuffle; None: all of a file, and HUB_EXAMPLES of the hub's."""
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0
    """The largest norm of a step's gradient."""
    seed: int = Field(default=0, ge=0, lt=2**63)


class LossPoint(BaseModel):
    """One step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    """From 1."""
    loss: float
    """Mean over the step's predicted tokens, in nats, before the step."""
    learning_rate: float
    tokens: int
    """That were predicted in this step."""
    seconds: float
    """Of fine-tuning until its end, over all restarts."""


class Perplexities(BaseModel):
    """One text, measured before fine-tuning and after."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    text: TextSpec
    before: PositiveFloat
    after: PositiveFloat
    tokens: PositiveInt


class Finetuning(BaseModel):
    """What was done, as the card of the folder tells it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    data: str
    """The name of the data; of a file the last part of its path."""
    form: Form
    examples: PositiveInt
    """That there were to learn from."""
    steps: PositiveInt
    tokens: PositiveInt
    """That were predicted, over all steps."""
    trained_parameters: PositiveInt
    first_loss: float
    last_loss: float
    """Means of the first and of the last tenth of the steps."""
    perplexity: Perplexities | None = None
    report_perplexity: Perplexities | None = None
    """Of a second text, which nothing was chosen by."""
