"""What is checked of a checkpoint, its config before the weights are loaded and they after; and how reading fails."""

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

from gpu_worker.models.errors import is_device_lost, is_out_of_memory
from gpu_worker.models.families import PRUNED, family_of
from gpu_worker.models.modeling import register_pruned_classes
from gpu_worker.models.quoting import quoted
from gpu_worker.models.sizes import check_numbers, check_sizes
from protocol.errors import ModelError, SelfPrunerError, UsageError

MAX_REASON_CHARACTERS = 300
"""Characters of another library's error that a sentence repeats: some of them repeat the file."""
STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of rotary positions of which a config states the length before they are stretched."""
LEFT_OVER = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""What a checkpoint may hold and the model does not: tables that old Llamas saved and that follow from the config."""


@contextmanager
def reading(sentence: Callable[[Exception], str], kind: type[UsageError] = ModelError) -> Iterator[None]:
    """While it lasts, an error is of this `kind`, with a `sentence` about it: other libraries are reading files.

    Our own errors stay what they are, and so do those that tell of the memory or the device and not of the files.
    """
    try:
        yield
    except SelfPrunerError:
        raise
    # A broken file is answered by whatever it runs into: KeyError, TypeError, ZeroDivisionError, UnpicklingError, ...
    except Exception as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        raise kind(sentence(error)) from error


def reason(error: Exception) -> str:
    """What an error of another library says, in one line."""
    if isinstance(error, UnpicklingError):  # torch's text advises to run whatever code the file holds
        return "the file of weights is damaged, or holds more than weights"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    told = isinstance(error, OSError | ValueError | SafetensorError) and line
    whole = line if told else f"{type(error).__name__}: {line}"
    return (whole if len(whole) <= MAX_REASON_CHARACTERS else f"{whole[:MAX_REASON_CHARACTERS]} …").rstrip(".,;: ")


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a model that is known to be of no use here from what its config.json says (`config`).

    Transformers has the supported families itself, and a folder that Self-Pruner exported is loaded with this version's
    own classes, so that no code from beside the weights is ever run.
    """
    family_of(SimpleNamespace(model_type=config.get("model_type")))
    if str(config.get("model_type")).startswith(PRUNED):
        register_pruned_classes()
    check_plain(name, config)
    check_numbers(name, config)
    check_sizes(name, config)


def check_plain(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError where the weights are quantised: packed numbers cannot be scored, ordered or sliced."""
    packing = config.get("quantization_config")
    if packing:
        raise ModelError(
            f"the weights of {name!r} are quantised ({quantisation_method(packing)}) and cannot be pruned; "
            "pass the unquantised model"
        )


def quantisation_method(packing: object) -> str:
    """What a `quantization_config` calls its method; the oldest of bitsandbytes say only how many bits."""
    if not isinstance(packing, Mapping):
        return "unknown method"
    named = packing.get("quant_method")
    if named:
        return quoted(named).strip("'")
    return "bitsandbytes" if packing.get("load_in_8bit") or packing.get("load_in_4bit") else "unknown method"


def longest_positions(config: Any) -> int | None:
    """Tokens of the longest text that a model of this config was made for; None where the config does not say.

    Llamas whose positions are stretched by a factor state the length before that. Others state the length after it:
    Llama 3.1, Phi-3 and Gemma 3, whose stretching differs by layer.
    """
    stated = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if stated is None or rope.get("rope_type") not in STRETCHED:
        return stated
    original = rope.get("original_max_position_embeddings") or stated
    return max(int(stated), int(original * rope["factor"]))


def load_weights(name: str, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """The causal language model of a folder or hub name, by transformers' loader with these `options`.

    Raises ModelError where it would have made weights up, or left some out: it goes on with random numbers in the gaps,
    and without what the config does not ask for.
    """
    # Weights of another size are told apart below, with a sentence.
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        # Where peft is installed, transformers adds an adapter that lies beside the weights, or loads the model that
        # the adapter names. It looks in a folder that does not exist, whose name cannot be guessed.
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
            f"{name!r} holds weights that its config does not ask for, so that without them it is another model: "
            f"{len(unasked)}, such as {unasked[0]!r}; pass a model with the config that belongs to its weights"
        )
    return loaded


_DONTNEED = 4
"""MADV_DONTNEED of Linux."""


Ranges = list[tuple[int, int]]
"""First address and the one after the last, in ascending order."""


def unmap(model: nn.Module) -> None:
    """Copy every parameter that is on the CPU, and give the pages of the original back at once.

    The mapping of a safetensors file lives as long as any tensor of it does, so that ordering the layers' weights would
    leave the originals resident beside the copies: nearly twice the model. On other systems than Linux pages go back
    when the file is closed.
    """
    files = _mapped_files()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                original = parameter.data
                parameter.data = original.clone()
                _give_back(original, files)


def _mapped_files() -> Ranges:
    """Where files are mapped into this process; nowhere on systems that do not tell."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    # 7f1c0a000000-7f1c0b000000 r--p 00000000 08:01 1234567 /path, and inode 0 where there is no file.
    lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
    first_and_end = (line[0].split("-") for line in lines if line[4] != "0")
    return [(int(first, 16), int(end, 16)) for first, end in first_and_end]


def _give_back(tensor: Tensor, files: Ranges) -> None:
    """Drop the pages that lie wholly in `tensor`, whose content nobody may read again.

    Only those of a file, which read the same afterwards: of a weight whose type was converted they are the process's
    own memory, and what else might share it would turn to nought.
    """
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if length > 0 and _within(files, start, start + length):
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _DONTNEED)


def _within(ranges: Ranges, start: int, end: int) -> bool:
    """Whether one of `ranges` holds all from `start` to `end`."""
    at = bisect_right(ranges, start, key=lambda each: each[0]) - 1
    return at >= 0 and end <= ranges[at][1]
