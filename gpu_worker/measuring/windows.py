"""Windows of tokens, of which all but the first are predicted, or only the answers of a task.

A token that is given and not predicted is stored as −1 − id, so that a text with prompts is a tensor [windows, seqlen]
like any other. Such tokens are those of prompts, and those that fill a window behind a short answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def given(tokens: Tensor) -> Tensor:
    """Return tokens that are given and not predicted."""
    return -1 - tokens


def token_ids(windows: Tensor) -> Tensor:
    """Return the ids of all tokens, predicted or given."""
    return torch.where(windows < 0, -1 - windows, windows)


def predicted_counts(windows: Tensor) -> list[int]:
    """Return the number of predicted tokens of each of `windows` (long, [n, seqlen], on the CPU)."""
    found: list[int] = (windows[:, 1:] >= 0).sum(dim=1).tolist()
    return found


def predicted_tokens(windows: Tensor) -> int:
    """Return the number of predicted tokens of `windows` (long, [n, seqlen], on the CPU)."""
    return sum(predicted_counts(windows))


def on_device(windows: Tensor, device: torch.device) -> Sequence[Tensor]:
    """Return each of `windows` (long, [n, seqlen], on the CPU) on `device`.

    Windows with given tokens stay on the CPU, where their predicted tokens are found without waiting for the device.
    They end with their last predicted token, because nothing behind it counts.
    """
    if not bool((windows < 0).any()):
        return list(windows.to(device))
    return [window[: int((window >= 0).nonzero().max()) + 1] for window in windows]
