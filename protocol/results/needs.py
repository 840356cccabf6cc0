"""What a search needs of a machine, as `selfpruner check` finds it before anything is loaded."""

from pydantic import Field

from protocol.plans.shape import ModelShape
from protocol.plans.spec import Role
from protocol.plans.value import Value

SENSITIVITY_TOKENS = 1024
"""Number of tokens on which the sensitivity of each unit is measured."""
PREWRITTEN_WINDOWS, PREWRITTEN_LENGTH = 160, 512
"""Size of the text that `smollm2` comes with (gpu_worker/measuring/smollm2_text.py): windows, and tokens in each."""


class Needs(Value):
    """The target model, its texts and its memory, with errors as sentences."""

    shape: ModelShape | None = None
    """None if neither the model nor its published sizes are known."""
    head_parameters: int = 0
    """Parameters of the output head."""
    longest: int | None = None
    """The model's context length in tokens."""
    model_error: str | None = None
    """Why the model cannot be loaded here."""
    windows: dict[Role, int] = Field(default_factory=dict)
    """Windows of each text that could be read."""
    texts_error: str | None = None
    memory: str = ""
    """What the model needs and what there is, in words."""
    memory_error: str | None = None
    gpus: int = 0
    """GPUs that the model is spread over; 0 on a CPU."""
    weight_bytes: int = 0
    texts_together: int = 1
    """Texts that the model writes at once."""


class DeviceSpeed(Value):
    """The speed of a device: measured here, or from its data sheet."""

    name: str
    multiply: float
    """Floating-point operations per second of a matrix product in the model's dtype, as measured or at its peak."""
    solve: float
    """The same in fp32, which least squares takes."""
    read: float
    """Bytes per second of its memory."""
    memory: int
    """Bytes of its memory."""
    is_measured: bool
