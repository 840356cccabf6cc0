"""Pruned models: loaded, and uploaded."""

from pathlib import Path
from typing import Any

from protocol.results.commands import PushResult
from protocol.runtime import logs
from protocol.runtime.paths import expanded


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


def push(folder: str | Path, repository: str, *, public: bool = False, license: str | None = None) -> PushResult:  # noqa: A002 (the Hub's name for it)
    """Upload an exported folder to `USER/NAME` on the Hugging Face Hub, created if it is missing, private at first.

    `license` is the base model's, for the card. Needs a token that may write, in HF_TOKEN or from `hf auth login`.
    Raises UsageError for what is no export, an invalid name, or no token; SelfPrunerError if the hub refuses.
    """
    from gpu_worker.export.push import push_once

    with logs.silent():
        return push_once(expanded(Path(folder)), repository, public=public, license_=license)
