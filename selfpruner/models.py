"""Pruned models, loaded."""

from pathlib import Path
from typing import Any

from protocol.runtime import logs


def load(folder: str | Path, *, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """Load an exported folder, or any model of a supported family; return a transformers model and its tokenizer.

    The model is in evaluation mode in `dtype` (`bfloat16`, `float32` or `float16`), on the GPUs, or on the CPU without
    a GPU. Never runs code from the folder, so no `trust_remote_code` is needed. Raises UsageError if the model is
    missing, broken, or too large for this machine.
    """
    from gpu_worker.models.loading import load_model

    with logs.silent():
        loaded = load_model(str(folder), dtype)
    return loaded.causal_lm, loaded.tokenizer
