"""ModelProfile: the data about the target model that a worker publishes before the LLM is asked."""

from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from protocol.errors import UsageError
from protocol.plans.shape import ModelShape
from protocol.plans.value import FiniteValue


class DensePerplexity(FiniteValue):
    """Perplexity of the dense model on one text, and the number of tokens averaged."""

    perplexity: PositiveFloat
    tokens: NonNegativeInt
    windows: PositiveInt
    seconds: float


class ModelProfile(FiniteValue):
    """The target model as measured by a worker. All workers of a search must agree on it."""

    fingerprint: str
    """Fingerprint of the spec that the model was loaded for."""
    model: str
    shape: ModelShape
    dense: DensePerplexity
    dense_report: DensePerplexity | None
    sensitivity: tuple[float, ...]
    """Per unit: KL(dense ‖ pruned) in nats per token when only this unit is pruned, at the search's rate."""
    outliers: tuple[float, ...] = ()
    """Per layer: OWL's share of outliers, in percent (M = 5). Empty unless importance is `wanda-sp`."""
    features: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Per unit: the measured features of protocol/plans/features.py, other than sensitivity and outliers."""
    texts: str
    """Digest of the token windows of all texts, by which workers with different files are detected."""
    device: str

    @model_validator(mode="after")
    def _has_a_value_per_unit(self) -> Self:
        if any(len(values) != len(self.sensitivity) for values in self.features.values()):
            raise ValueError("features do not have one value per unit")
        return self


def check_profile(published: ModelProfile, mine: ModelProfile) -> None:
    """Raise UsageError unless this worker's profile matches the profile that the first worker published."""
    if published.shape != mine.shape:
        raise UsageError(f"this worker's {mine.model} does not have the shape that the search started with")
    if published.texts != mine.texts:
        raise UsageError(
            "this worker's texts differ from those that the search started with: give all workers the same files, "
            "or choose a new search.name for the new texts"
        )
    ratio = mine.dense.perplexity / published.dense.perplexity
    if not 0.98 < ratio < 1.02:
        raise UsageError(
            f"this worker measures a dense perplexity of {mine.dense.perplexity:.3f}, but the search started with "
            f"{published.dense.perplexity:.3f}: its weights differ; give all workers the same model"
        )
