"""The texts of a target: checked before the weights are loaded, and read when the model is there to write its own."""

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from gpu_worker.measuring.corpora import load_roles
from gpu_worker.measuring.self_text import self_text
from gpu_worker.models.loading import LoadedModel
from gpu_worker.progress import Progress
from protocol.errors import DataError
from protocol.plans.spec import Role, TextSpec

ShareText = Callable[[int, int, Callable[[], Tensor]], Tensor]
"""(number of windows, their length, function that writes them) -> tokens that all workers use
(measuring/self_text.py)."""


def check_length(model: LoadedModel, seqlen: int) -> None:
    """Raise DataError for windows longer than the model's context length, beyond which its predictions are useless."""
    longest = model.longest_positions
    if longest is not None and seqlen > longest:
        raise DataError(too_long(seqlen, longest))


def too_long(seqlen: int, longest: int) -> str:
    """Say that windows are longer than the model's context length."""
    return f"windows of {seqlen} tokens are longer than the {longest} positions that the model supports"


def count_windows(
    model: LoadedModel, texts: Mapping[Role, TextSpec], seed: int, only: Collection[Role] | None = None
) -> dict[Role, int]:
    """Return the number of windows of each text, or of `only` some (see `load_roles`).

    `model` may be without weights: text that it writes is not written. Raises DataError for a text that is too short or
    cannot be read, and for windows that are too long for the model.
    """
    check_length(model, max((text.seqlen for text in texts.values()), default=0))
    found = load_roles(texts, seed, model.tokenizer, _unwritten, model.window_start, only)
    return {role: len(windows) for role, windows in found.items()}


def read_texts(
    model: LoadedModel,
    texts: Mapping[Role, TextSpec],
    seed: int,
    progress: Progress,
    share_text: ShareText | None = None,
    only: Collection[Role] | None = None,
) -> dict[Role, Tensor]:
    """Return the windows [n, seqlen] of each text, or of `only` some. Raises as `count_windows` does."""

    def written(windows: int, length: int) -> Tensor:
        write = partial(self_text, model, windows, length, seed, progress)
        return share_text(windows, length, write) if share_text else write()

    progress("reading texts", 0, 1)
    windows = load_roles(texts, seed, model.tokenizer, written, model.window_start, only)
    progress("reading texts", 1, 1)
    return windows


def _unwritten(windows: int, length: int) -> Tensor:
    return torch.zeros(windows, length, dtype=torch.long)
