"""Checks, by their model profiles, that two workers of a search measure the same model on the same texts."""

from protocol.errors import UsageError
from protocol.plans.profile import ModelProfile


def check_profile(published: ModelProfile, mine: ModelProfile) -> None:
    """Raise UsageError unless this worker's profile matches the one that the first worker published."""
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
