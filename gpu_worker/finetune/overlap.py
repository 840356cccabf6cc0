"""Finds evaluation text that the model was trained on, whatever the files are called."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_worker.measuring.windows import token_ids
from protocol.errors import DataError

PASSAGE = 16
"""Tokens of a passage. So many equal tokens in a row are hardly a coincidence: WikiText-2 has 0.01 % of the passages of
its test text in its validation text."""
MOST_SHARED = 0.05
"""Largest share of an evaluation text's passages that may be in the training data; licences and headers repeat."""


def shared_share(trained: Sequence[Tensor], windows: Tensor) -> float:
    """Return the share of the passages of `windows` (long, [n, seqlen]) that are in `trained` (each long, [length]).

    Passages that do not end at a predicted token do not count: prompts may be alike.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (PASSAGE,), generator=generator)

    def hashes(tokens: Tensor) -> Tensor:
        # Integers overflow without harm: equal passages have equal sums.
        return (tokens.unfold(-1, PASSAGE, 1) * factors).sum(-1)

    if windows.shape[1] < PASSAGE:
        return 0.0
    known = [hashes(tokens) for tokens in trained if len(tokens) >= PASSAGE]
    measured = hashes(token_ids(windows))[windows[:, PASSAGE - 1 :] >= 0]
    if not known or not len(measured):
        return 0.0
    return torch.isin(measured, torch.cat(known)).double().mean().item()


def check_overlap(trained: Sequence[Tensor], windows: Tensor, text: str) -> None:
    """Raise DataError if `windows` of the evaluation `text` are trained on."""
    share = shared_share(trained, windows)
    if share > MOST_SHARED:
        raise DataError(f"{share:.0%} of the evaluation text {text!r} is also in the training data: measure on another")
