"""Text that SmolLM2 has written, so that a first search need not wait some minutes for such text.

`sample` in self_text.py wrote it in bfloat16 with seed 0. The settings of best.yaml need 144 windows of 512 tokens.
"""

from importlib.resources import as_file, files

import numpy
import torch
from torch import Tensor

from protocol.results.needs import PREWRITTEN_LENGTH, PREWRITTEN_WINDOWS

_FILE = files("gpu_worker.measuring") / "smollm2-text.npy"


def written_beforehand(windows: int, length: int, seed: int) -> Tensor | None:
    """Return windows (long, [windows, length]), chosen by `seed` and cut; None if the text is smaller."""
    if windows > PREWRITTEN_WINDOWS or length > PREWRITTEN_LENGTH:
        return None
    with as_file(_FILE) as file:
        tokens = torch.from_numpy(numpy.load(file, allow_pickle=False).astype(numpy.int64))
    chosen = torch.randperm(PREWRITTEN_WINDOWS, generator=torch.Generator().manual_seed(seed))[:windows]
    return tokens[chosen, :length]
