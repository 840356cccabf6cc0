"""Runs a new GGUF file in llama.cpp, compares it with the model in memory, and refuses broken files."""

from importlib.util import find_spec
from pathlib import Path

import structlog
import torch
from torch import Tensor

from gpu_worker.llama_cpp.client import MIN_CONTEXT, ask, gguf_perplexity, running
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.loading import LoadedModel
from gpu_worker.models.machine import gigabytes, main_memory
from gpu_worker.progress import Progress
from protocol.errors import ModelError
from protocol.results.commands import GgufPerplexity
from protocol.results.formats import GgufType
from protocol.runtime.llama_server import ServerOptions

log = structlog.get_logger()

TOKENS = 2048
"""Maximum number of tokens that are measured, in whole windows. At least one window is measured."""
ROUNDED: dict[GgufType, float] = {"f16": 1.05, "q8_0": 1.2, "q6_k": 1.2}
FEW_BITS = 4.0
"""Largest allowed ratio of the file's perplexity to that in memory: by file type, and for all other file types.
Quantisation of a usable model stays below this ratio; a file with wrong tensors exceeds it by a factor of hundreds."""


def measure_gguf(
    path: Path, model: LoadedModel, windows: Tensor, file_type: GgufType, progress: Progress
) -> GgufPerplexity | None:
    """Measure the perplexity of the file and of `model`, from which it was written, on the first `windows`.

    `windows` are long, [n, seqlen]. Returns None if llama.cpp is not installed, or if main memory is too small for the
    file beside the model. Raises ModelError if llama.cpp cannot load the file, or if its perplexity is too high.
    """
    if find_spec("xllamacpp") is None:
        return None
    needed, available = path.stat().st_size, main_memory()
    if needed > available:
        log.warning("gguf_not_measured", file=path.name, needed=gigabytes(needed), available=gigabytes(available))
        return None
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


def check_gguf_runs(path: Path) -> None:
    """Load the file in llama.cpp and generate a few tokens. Raises ModelError if that fails."""
    wanted = 4
    body = {"prompt": list(range(8)), "n_predict": wanted, "temperature": 0.0, "ignore_eos": True}
    with running(ServerOptions(str(path), torch.get_num_threads(), MIN_CONTEXT)) as address:
        generated = ask(address, "/completion", body).get("timings", {}).get("predicted_n", 0)
    if generated != wanted:
        raise ModelError(f"llama.cpp generated {generated} tokens with {path.name} where {wanted} were asked for")
