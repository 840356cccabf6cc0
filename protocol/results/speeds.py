"""Results of `selfpruner speed`, with the JSON of `--json`."""

from pathlib import Path

from pydantic import Field

from protocol.plans.value import Value
from protocol.results.formats import Engine


class Spread(Value):
    """The median and range of repeated measurements."""

    median: float
    lowest: float
    highest: float


class PhaseSpeed(Value):
    """Prefill or decode speed at one batch size, measured alternately on the dense and the pruned model."""

    tokens: int
    """Number of tokens processed in one repeat, over the whole batch."""
    dense: Spread
    """Speed in tokens per second."""
    pruned: Spread
    speed_up: Spread
    """Spread of the ratios pruned / dense, one for each repeat; 2 is twice as fast."""


class BatchSpeed(Value):
    """Speed at one batch size."""

    batch_size: int
    repeats: int
    """Number of repeats measured: fewer than requested if a signal ended the measurement."""
    prefill: PhaseSpeed
    decode: PhaseSpeed


class ModelSize(Value):
    """Size of a model in an engine."""

    decoder_parameters: int
    total_parameters: int
    weight_bytes: int
    """Size of the tensors in memory, tied tensors counted once."""
    kv_cache_bytes_per_token: int
    """KV cache for one more token, over all layers."""
    kv_cache_bytes: int
    """KV cache for one text of the measured length, prompt and generated tokens."""
    disk_bytes: int | None
    """Size of the weight files; None for a model from the hub."""
    weight_type: str
    """Type of the stored weights, such as `bfloat16` or `q8_0`."""


class EngineSpeed(Value):
    """Speed and sizes in one engine."""

    engine: Engine
    device: str
    threads: int | None
    """Number of CPU threads; None on a GPU."""
    dense: ModelSize
    pruned: ModelSize
    batches: tuple[BatchSpeed, ...]


class SpeedResult(Value):
    """Tokens per second of an exported folder and its dense model."""

    folder: Path
    baseline: str
    prompt: int
    """Number of tokens of each prompt."""
    generate: int
    """Number of tokens generated after each prompt."""
    repeats: int
    """Number of repeats requested for each batch size."""
    interrupted: bool = False
    """Whether a signal ended the measurement, so that figures are partial or missing."""
    warm_up: int
    """Number of repeats before the measured repeats."""
    engines: tuple[EngineSpeed, ...]
    skipped: dict[Engine, str] = Field(default_factory=dict)
    """Engines that were skipped, and the reason."""
