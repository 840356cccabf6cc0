"""Results of `selfpruner speed`, with the JSON of `--json`."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from protocol.results.formats import Engine


class Spread(BaseModel):
    """The median and range of repeated measurements."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    lowest: float
    highest: float


class PhaseSpeed(BaseModel):
    """Prefill or decode speed at one batch size, measured alternately on the dense and the pruned model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int
    """Tokens processed in one repeat, over the whole batch."""
    dense: Spread
    """Tokens per second."""
    pruned: Spread
    speed_up: Spread
    """Spread of the ratios pruned / dense, one for each repeat; 2 is twice as fast."""


class BatchSpeed(BaseModel):
    """Speed at one batch size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int
    prefill: PhaseSpeed
    decode: PhaseSpeed


class ModelSize(BaseModel):
    """Size of a model in an engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoder_parameters: int
    total_parameters: int
    weight_bytes: int
    """Size of the tensors in memory, tied ones counted once."""
    kv_cache_bytes_per_token: int
    """KV cache for one more token, over all layers."""
    kv_cache_bytes: int
    """KV cache for one text of the measured length, prompt and generated tokens."""
    disk_bytes: int | None
    """Size of the weight files; None for a model from the hub."""
    weight_type: str
    """Type of the stored weights, such as `bfloat16` or `q8_0`."""


class EngineSpeed(BaseModel):
    """Speed and sizes in one engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Engine
    device: str
    threads: int | None
    """Number of CPU threads; None on a GPU."""
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
    """Tokens generated after each prompt."""
    repeats: int
    warm_up: int
    """Repeats before the measured ones."""
    engines: tuple[EngineSpeed, ...]
    skipped: dict[Engine, str] = {}
    """Engines that were skipped, and the reason."""
