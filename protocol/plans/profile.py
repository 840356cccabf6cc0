"""ModelProfile: what the worker tells the search about the target model before the first question is asked."""

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat

from protocol.plans.shape import ModelShape


class DensePerplexity(BaseModel):
    """Perplexity of the unpruned model on one text, with what it was averaged over."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    perplexity: PositiveFloat
    tokens: NonNegativeInt
    seconds: float

    def windows(self, seqlen: int) -> int:
        """How many windows of so many tokens the text has; the first token of each is not predicted."""
        return self.tokens // (seqlen - 1)


class ModelProfile(BaseModel):
    """The target model as measured by a worker. All workers of a search have to agree on it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    fingerprint: str
    """Of the spec that the model was loaded for."""
    model: str
    shape: ModelShape
    dense: DensePerplexity
    dense_report: DensePerplexity | None
    sensitivity: tuple[float, ...]
    """Per unit of the search: KL(dense ‖ pruned), in nats a token, when it alone is pruned by the search's rate."""
    outliers: tuple[float, ...] = ()
    """Per layer: OWL's share of outliers, in percent (M = 5). None where importance is not `wanda-sp`."""
    texts: str
    """Digest of the token windows of all texts: two workers with different files do not agree."""
    device: str
