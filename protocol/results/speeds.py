"""What `selfpruner speed` finds: as JSON what a program reads of it."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from protocol.results.formats import Engine


class Spread(BaseModel):
    """A figure that was measured several times."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    lowest: float
    highest: float


class PhaseSpeed(BaseModel):
    """The prefill or the decode of one batch size, dense and pruned in turn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    """Processed in one repeat, over all texts of the batch."""
    dense: Spread
    """Tokens per second."""
    pruned: Spread
    speed_up: Spread
    """Of the ratios pruned / dense, one for each repeat: 2 is twice as fast."""


class BatchSpeed(BaseModel):
    """What was measured with so many texts at a time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int
    prefill: PhaseSpeed
    decode: PhaseSpeed


class ModelSize(BaseModel):
    """How large a model is in an engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoder_parameters: int
    total_parameters: int
    weight_bytes: int
    """Of the tensors in memory, tied ones once."""
    kv_cache_bytes_per_token: int
    """What one more token adds, over all layers."""
    kv_cache_bytes: int
    """Of one text of the measured length, prompt and generated tokens."""
    disk_bytes: int | None
    """Of the files that hold the weights; None where the hub keeps them."""
    weight_type: str
    """How weights are stored, such as `bfloat16` or `q8_0`."""


class EngineSpeed(BaseModel):
    """What one engine measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Engine
    device: str
    threads: int | None
    """Of the CPU; None on a GPU."""
    dense: ModelSize
    pruned: ModelSize
    batches: tuple[BatchSpeed, ...]


class SpeedResult(BaseModel):
    """Tokens per second of an exported folder and its dense model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    baseline: str
    prompt: int
    """Tokens of each prompt."""
    generate: int
    """Tokens generated after it."""
    repeats: int
    warm_up: int
    """Repeats before those that count."""
    engines: tuple[EngineSpeed, ...]
    skipped: dict[Engine, str] = {}
    """Engines that did not measure, and why."""
