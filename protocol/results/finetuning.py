"""The fine-tuning recipe of a pruned model, and the record of it in the exported folder."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from protocol.plans.spec import TextSpec, is_examples
from protocol.plans.value import FiniteValue, Value

ALPACA_GPT4 = "alpaca-gpt4"
"""Name of the paper's instruction data, which is downloaded from the hub."""
HUB_EXAMPLES = 10_000
"""Default number of examples from ALPACA_GPT4, as in the paper."""
Method = Literal["lora", "full"]
"""LoRA on the seven projections of each decoder layer, or full training of these projections."""
Form = Literal["alpaca", "text"]
"""`alpaca`: instructions with answers, and only the answers are predicted. `text`: plain text, and all tokens are
predicted."""
Schedule = Literal["cosine", "linear", "constant"]


def form_of(source: str) -> Form:
    """Return the form of the data: ALPACA_GPT4, .json and .jsonl files are instructions, everything else is text."""
    return "alpaca" if source == ALPACA_GPT4 or is_examples(source) else "text"


class Recipe(FiniteValue):
    """All settings that determine the result of fine-tuning."""

    method: Method = "lora"
    rank: PositiveInt = 8
    """LoRA's r."""
    alpha: PositiveFloat = 16.0
    """LoRA's update is scaled by alpha / rank."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on LoRA's inputs."""
    distilled: float = Field(default=0.0, ge=0, le=1)
    """Share of the loss that is the divergence from the dense model's predictions. The rest is the negative
    log-likelihood of the data."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    schedule: Schedule = "cosine"
    """How the learning rate falls to zero after the warm-up."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    epochs: PositiveInt = 2
    max_steps: PositiveInt | None = None
    """Maximum number of steps. If it ends training earlier than `epochs`, the schedule is shortened to this number."""
    batch: PositiveInt = 64
    """Examples, or windows of a text, per step."""
    micro_batch: PositiveInt = 4
    """Examples per forward pass."""
    seqlen: int = Field(default=256, ge=16)
    """Maximum number of tokens of an example (longer examples are cut), or number of tokens in a text's window."""
    examples: PositiveInt | None = None
    """Number of examples, chosen by a seeded shuffle; None means all of a file, or HUB_EXAMPLES from the hub."""
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0
    """Maximum gradient norm."""
    seed: int = Field(default=0, ge=0, lt=2**63)


class LossPoint(Value):
    """The loss of one training step."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """Mean over the step's predicted tokens, in nats, before the update."""
    learning_rate: float
    tokens: int
    """Number of tokens predicted in this step."""
    seconds: float
    """Training time up to the end of this step, over all restarts."""


class Perplexities(FiniteValue):
    """Perplexity on one text, before and after fine-tuning."""

    text: TextSpec
    before: PositiveFloat
    after: PositiveFloat
    tokens: PositiveInt


class Finetuning(Value):
    """The record of a fine-tuning in the exported folder."""

    recipe: Recipe
    data: str
    """The name of the data; for a file, the last part of its path."""
    form: Form
    teacher: str | None = None
    """Name of the model whose predictions were learnt; for a file or folder, the last part of its path."""
    examples: PositiveInt
    """Number of training examples."""
    steps: PositiveInt
    tokens: PositiveInt
    """Number of tokens predicted, over all steps."""
    trained_parameters: PositiveInt
    first_loss: float
    last_loss: float
    """Mean loss over the first and the last 10 % of the steps."""
    perplexity: Perplexities | None = None
    report_perplexity: Perplexities | None = None
    """Perplexities on a second text, which did not influence any choice."""
