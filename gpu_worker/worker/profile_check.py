"""Whether two workers of a search measure the same: their model profiles tell."""

from protocol.errors import UsageError
from protocol.plans.profile import ModelProfile


def check_profile(published: ModelProfile, mine: ModelProfile) -> None:
    """Raise UsageError unless this worker measures the same model on the same texts as the first one did."""
    if published.shape != mine.shape:
        raise UsageError(f"this worker's {mine.model} has another shape than the one the search began with")
    if published.texts != mine.texts:
        raise UsageError(
            "this worker's texts are not the ones the search began with: give all workers the same files, "
            "or the new texts a new search.name"
        )
    ratio = mine.dense.perplexity / published.dense.perplexity
    if not 0.98 < ratio < 1.02:
        raise UsageError(
            f"this worker measures a dense perplexity of {mine.dense.perplexity:.3f} where the search began with "
            f"{published.dense.perplexity:.3f}: its weights differ"
        )
