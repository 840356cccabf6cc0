"""Text that SmolLM2 wrote beforehand, so that a first search with it does not wait minutes until it has written.

`sample` in self_text.py wrote it in bfloat16 with seed 0.
"""

from importlib.resources import as_file, files

import numpy
import torch
from torch import Tensor

WINDOWS, LENGTH = 160, 512
"""Size of the text. The settings of best.yaml need 144 windows of this length."""
_FILE = files("gpu_worker.measuring") / "smollm2-text.npy"


def written_beforehand(windows: int, length: int, seed: int) -> Tensor | None:
    """Return windows (long, [windows, length]), chosen by `seed` and cut; None if the text is smaller."""
    if windows > WINDOWS or length > LENGTH:
        return None
    with as_file(_FILE) as file:
        tokens = torch.from_numpy(numpy.load(file, allow_pickle=False).astype(numpy.int64))
    chosen = torch.randperm(WINDOWS, generator=torch.Generator().manual_seed(seed))[:windows]
    return tokens[chosen, :length]
