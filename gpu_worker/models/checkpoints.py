"""Loads a checkpoint's weights, and checks its config before and its weights after loading."""

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from gpu_worker.models.errors import is_device_lost, is_out_of_memory, quoted
from gpu_worker.models.families import PRUNED, family_of
from gpu_worker.models.modeling import register_pruned_classes
from gpu_worker.models.sizes import check_numbers, check_sizes
from protocol.errors import ModelError, SelfPrunerError, UsageError

MAX_REASON_CHARACTERS = 300
"""Maximum number of characters of another library's error that a message quotes. Some errors contain the whole file."""
STRETCHED = ("linear", "dynamic", "yarn")
"""Rope types whose config states the context length before scaling."""
LEFT_OVER = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Extra tensors that a checkpoint may have: tables that old Llamas saved, although they follow from the config."""


@contextmanager
def reading(sentence: Callable[[Exception], str], kind: type[UsageError] = ModelError) -> Iterator[None]:
    """Convert errors of libraries that read files into errors of this `kind`, with `sentence(error)` as message.

    This project's own errors pass through, and so do errors about memory or the device.
    """
    try:
        yield
    except SelfPrunerError:
        raise
    # A broken file can cause any error: KeyError, TypeError, ZeroDivisionError, UnpicklingError, ...
    except Exception as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        raise kind(sentence(error)) from error


def reason(error: Exception) -> str:
    """Return the message of another library's error in one line."""
    if isinstance(error, UnpicklingError):  # torch's message advises running the code in the file
        return "the weight file is damaged, or contains more than weights"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    is_readable = isinstance(error, OSError | ValueError | SafetensorError) and line
    whole = line if is_readable else f"{type(error).__name__}: {line}"
    return (whole if len(whole) <= MAX_REASON_CHARACTERS else f"{whole[:MAX_REASON_CHARACTERS]} …").rstrip(".,;: ")


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a model that cannot be used, judging by its config.json (`config`).

    transformers contains the supported families, and a folder that Self-Pruner exported is loaded with this version's
    own classes. So no code from the model's folder is ever run.
    """
    family_of(SimpleNamespace(model_type=config.get("model_type")))
    if str(config.get("model_type")).startswith(PRUNED):
        register_pruned_classes()
    check_plain(name, config)
    check_numbers(name, config)
    check_sizes(name, config)


def check_plain(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError for quantised weights: packed values cannot be scored, ordered or sliced."""
    packing = config.get("quantization_config")
    if packing:
        raise ModelError(
            f"the weights of {name!r} are quantised ({quantisation_method(packing)}) and cannot be pruned; "
            "pass the unquantised model"
        )


def quantisation_method(packing: object) -> str:
    """Return the method that a `quantization_config` names. Old bitsandbytes configs state only the bits."""
    if not isinstance(packing, Mapping):
        return "unknown method"
    named = packing.get("quant_method")
    if named:
        return quoted(named).strip("'")
    return "bitsandbytes" if packing.get("load_in_8bit") or packing.get("load_in_4bit") else "unknown method"


def longest_positions(config: Any) -> int | None:
    """Return the context length in tokens that a model of this config supports; None if the config does not say.

    With the rope types in `STRETCHED`, a config states the length before scaling. With other rope types (Llama 3.1,
    Phi-3, Gemma 3), it states the length after scaling.
    """
    stated = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if stated is None or rope.get("rope_type") not in STRETCHED:
        return stated
    original = rope.get("original_max_position_embeddings") or stated
    return max(int(stated), int(original * rope["factor"]))


def load_weights(name: str, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """Return the causal language model of a folder or hub name, loaded by transformers with these `options`.

    Raises ModelError for missing or unexpected weights: transformers would continue with random values for missing
    weights, and would ignore unexpected weights.
    """
    # Weights of another size are reported below, in one sentence.
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        # If peft is installed, transformers would add an adapter that lies beside the weights, or load the model that
        # the adapter names. This argument makes transformers look for adapters in a folder that does not exist and
        # whose name cannot be guessed.
        adapter_kwargs={"subfolder": uuid4().hex, "local_files_only": options.get("local_files_only", False)},
        **options,
    )
    lacking = sorted(str(key) for key in report["missing_keys"])
    lacking += sorted(str(key[0]) for key in report["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{name!r} does not hold the weights that its config asks for: {len(lacking)} are missing or of another "
            f"size, such as {lacking[0]!r}; pass the plain, unquantised model without adapters"
        )
    unasked = sorted(str(key) for key in report["unexpected_keys"] if not str(key).endswith(LEFT_OVER))
    if unasked:
        raise ModelError(
            f"{name!r} holds weights that its config does not ask for, and would be a different model without them: "
            f"{len(unasked)}, such as {unasked[0]!r}; pass a model whose config matches its weights"
        )
    return loaded


_DONTNEED = 4
"""MADV_DONTNEED of Linux."""


Ranges = list[tuple[int, int]]
"""Start and end address (exclusive) of each range, in ascending order."""


def unmap(model: nn.Module) -> None:
    """Copy every parameter on the CPU, and release the mapped pages of the original immediately.

    A safetensors file stays mapped as long as any of its tensors lives. Ordering the weights would therefore keep both
    originals and copies in memory: nearly twice the model. On systems other than Linux, pages are released when the
    file is closed.
    """
    files = _mapped_files()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                original = parameter.data
                parameter.data = original.clone()
                _release_pages(original, files)


def _mapped_files() -> Ranges:
    """Return the address ranges of mapped files in this process; empty on systems without /proc."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    # 7f1c0a000000-7f1c0b000000 r--p 00000000 08:01 1234567 /path; the inode is 0 if there is no file.
    lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
    first_and_end = (line[0].split("-") for line in lines if line[4] != "0")
    return [(int(first, 16), int(end, 16)) for first, end in first_and_end]


def _release_pages(tensor: Tensor, files: Ranges) -> None:
    """Release the pages that lie entirely in `tensor`, whose content must not be read again.

    Only pages of a mapped file are released, because they can be read again from the file. Pages of a converted weight
    are anonymous memory, and releasing them would zero any other data on them.
    """
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0 and _within(files, start, start + length):
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _DONTNEED)


def _within(ranges: Ranges, start: int, end: int) -> bool:
    """Return whether one of `ranges` contains all addresses from `start` to `end`."""
    at = bisect_right(ranges, start, key=lambda each: each[0]) - 1
    return at >= 0 and end <= ranges[at][1]
