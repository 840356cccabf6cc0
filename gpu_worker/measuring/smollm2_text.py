"""Text that SmolLM2 wrote beforehand, so that a first search with it does not wait minutes until it has written.

`python -m gpu_worker.measuring.smollm2_text` writes the file again, in ten minutes on a CPU with bf16 instructions.
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


def main() -> None:
    """Write the file."""
    from gpu_worker.measuring.self_text import sample
    from gpu_worker.models.loading import load_model
    from gpu_worker.progress import no_progress

    tokens = sample(load_model("smollm2", "bfloat16"), WINDOWS, LENGTH, 0, no_progress)
    with as_file(_FILE) as file:
        numpy.save(file, tokens.numpy().astype("<u2"))


if __name__ == "__main__":
    main()
