"""A GGUF file that was just written, measured in llama.cpp beside the model in memory: broken ones are not kept."""

from importlib.util import find_spec
from pathlib import Path

import structlog
from torch import Tensor

from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.loading import LoadedModel
from gpu_worker.models.memory import main_memory
from gpu_worker.progress import Progress
from protocol.errors import ModelError
from protocol.results.commands import GgufPerplexity
from protocol.results.formats import GgufType
from protocol.runtime.amounts import gigabytes

log = structlog.get_logger()

TOKENS = 2048
"""How many are measured at the most, in whole windows, but for a first one that is longer."""
ROUNDED: dict[GgufType, float] = {"f16": 1.05, "q8_0": 1.2, "q6_k": 1.2}
FEW_BITS = 4.0
"""How many times the perplexity in memory a file's may be, by its type: more than rounding does to any model that can
be used; a file with wrong tensors, or wrongly read, has hundreds of times as much."""


def measure_gguf(
    path: Path, model: LoadedModel, windows: Tensor, file_type: GgufType, progress: Progress
) -> GgufPerplexity | None:
    """What the file computes on the first of `windows` (long, [n, seqlen]), and `model`, which it was written from.

    None where llama.cpp is not installed, or main memory has no room for the file beside the model. Raises ModelError
    where llama.cpp cannot load the file, or computes something else than the model does.
    """
    if find_spec("xllamacpp") is None:
        return None
    needed, there = path.stat().st_size, main_memory()
    if needed > there:
        log.warning("gguf_not_measured", file=path.name, needed=gigabytes(needed), available=gigabytes(there))
        return None
    from gpu_worker.llama_cpp.client import gguf_perplexity

    windows = windows[: max(1, TOKENS // windows.shape[1])]
    in_memory, tokens = perplexity(model.decoder, windows)
    try:
        found = gguf_perplexity(path, windows, progress)
    except NotFiniteError as error:
        raise ModelError(f"{path.name} is broken: in llama.cpp {error}") from error
    if found > in_memory * ROUNDED.get(file_type, FEW_BITS):
        raise ModelError(
            f"{path.name} is broken: in llama.cpp it has a perplexity of {found:.4g} where the model that it was "
            f"written from has {in_memory:.4g}"
        )
    return GgufPerplexity(file_type=file_type, perplexity=found, in_memory=in_memory, tokens=tokens)
