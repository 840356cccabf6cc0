"""Loads the target model: `smollm2`, a folder, a GGUF file, or a name on the Hugging Face hub."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
import transformers

from gpu_worker.models.checkpoint_files import (
    ADAPTER,
    INDEXES,
    WEIGHTS,
    adapter_sentence,
    check_files,
    check_index,
    check_stored,
    has_tokenizer,
)
from gpu_worker.models.checkpoints import check_config, load_weights, longest_positions, reading, reason, unmap
from gpu_worker.models.families import FAMILIES, Decoder, extract_decoder
from gpu_worker.models.gguf_files import unpacked
from gpu_worker.models.hub import hub_reachable
from gpu_worker.models.identity import folder_identity
from gpu_worker.models.machine import Machine, this_machine
from gpu_worker.models.memory import MemoryEstimate, Workload, combined, estimate_memory
from gpu_worker.models.placement import Placement, device_map, meta_model, place, share_of
from protocol.errors import ModelError
from protocol.results.formats import FACTS, only_for_llama_cpp
from protocol.runtime.paths import SMOLLM2, WHAT_TO_PASS, check_model, expanded, smollm2_file

log = structlog.get_logger()


@dataclass(frozen=True)
class LoadedModel:
    """A dense model in evaluation mode on its devices, with its decoder and tokenizer."""

    causal_lm: Any
    tokenizer: Any
    decoder: Decoder
    identity: str
    """Digest of the folder, or the hub's commit. It identifies the weights and is equal on all machines."""
    name: str = ""
    """What it was loaded by."""
    fit_in_main_memory: bool = False
    """Whether the GPUs have no room for the matrices of the fit (gpu_worker/models/placement.py)."""

    @property
    def window_start(self) -> int | None:
        """Return the token that every window must begin with; None for families that need no such token."""
        needed = FAMILIES[self.decoder.shape.family].starts_with_bos
        return int(self.tokenizer.bos_token_id) if needed and self.tokenizer.bos_token_id is not None else None

    @property
    def longest_positions(self) -> int | None:
        """Return the context length in tokens that the model supports; None if its config does not say."""
        return longest_positions(self.causal_lm.config)

    @property
    def device(self) -> torch.device:
        """Return the device for token ids."""
        return self.decoder.device


def device_name(device: torch.device) -> str:
    """Return `cpu`, or `cuda` with the GPU's name."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def load_model(
    name: str,
    dtype: str,
    workload: Workload = Workload(),  # noqa: B008 (it is frozen)
    check: Callable[[LoadedModel], object] | None = None,
) -> LoadedModel:
    """Load the model called `name` in `dtype` (`bfloat16`, ...) on the GPUs, or on the CPU if there is no GPU.

    Before the weights are loaded, `check` is called with the model on the meta device, and may raise. Never runs code
    from the model's folder. Raises ModelError if the model is missing, broken, quantised or of an unsupported family;
    and, before loading weights, if memory is too small for the model and `workload`.
    """
    found = _look_up(name, dtype)
    estimate, machine = _estimated(name, found, dtype, workload)
    placement = place(estimate, machine)
    if check is not None:
        check(_without_weights(name, found))
    if placement.fit_in_main_memory and estimate.with_fit_in_main_memory is not None:
        log.info("fit_in_main_memory", model=name, needs=estimate.with_fit_in_main_memory.description)
    return _loaded(name, found, dtype, placement)


def load_side_by_side(names: Sequence[str], dtype: str, workload: Workload) -> tuple[LoadedModel, ...]:
    """Load models that run in turn without pruning, all on one GPU or all spread over the same GPUs.

    Raises ModelError as `load_model` does; and, before loading weights, if memory is too small for all of them.
    """
    looked_up = [_look_up(name, dtype) for name in names]
    each = [_estimated(name, found, dtype, workload)[0] for name, found in zip(names, looked_up, strict=True)]
    whole = combined(each)
    placement = place(whole, this_machine())
    return tuple(
        _loaded(name, found, dtype, share_of(placement, estimate.weights, whole.weights))
        for name, found, estimate in zip(names, looked_up, each, strict=True)
    )


def load_without_weights(name: str, dtype: str) -> LoadedModel:
    """Load the model called `name` on the meta device, without weights, for checks before the real load.

    Raises ModelError as `load_model` does, but checks neither memory nor weights.
    """
    return _without_weights(name, _look_up(name, dtype))


@dataclass(frozen=True)
class _Found:
    """Location and config of a model."""

    source: str
    offline: bool
    config: Any
    bare: Any
    decoder: Decoder
    """The decoder of `bare`, which is on the meta device."""

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of every `from_pretrained` call."""
        return {"trust_remote_code": False, "local_files_only": self.offline}


def _look_up(name: str, dtype: str) -> _Found:
    transformers.utils.logging.disable_progress_bar()
    with reading(lambda error: f"the model {name!r} cannot be looked up ({reason(error)}); {WHAT_TO_PASS}"):
        source = _source(name, dtype)
    offline = not (Path(source).is_dir() or hub_reachable())
    options = {"trust_remote_code": False, "local_files_only": offline}
    with reading(partial(_cannot_load, name, "files", offline)):
        _check_source(name, source, options)
    with reading(partial(_cannot_load, name, "config", offline)):
        check_config(source, _written_config(source, options))
        config = transformers.AutoConfig.from_pretrained(source, **options)
        bare = meta_model(config, getattr(torch, dtype))
    decoder = extract_decoder(bare)
    with reading(partial(_cannot_load, name, "weights", offline)):
        if Path(source).is_dir():
            check_stored(name, Path(source), decoder.shape.total_parameters)
    return _Found(source, offline, config, bare, decoder)


def _check_source(name: str, source: str, options: dict[str, Any]) -> None:
    """Check the files of a folder. For a model on the hub, check only the files that refer to other files."""
    if Path(source).is_dir():
        check_files(name, Path(source))
        return
    offline = options["local_files_only"]
    has = partial(transformers.utils.hub.has_file, source, local_files_only=offline)
    if has(ADAPTER) and not any(map(has, WEIGHTS)):
        raise ModelError(adapter_sentence(name))
    for file in INDEXES:
        found = transformers.utils.cached_file(
            source, file, local_files_only=offline, _raise_exceptions_for_missing_entries=False
        )
        if found is not None:
            check_index(name, Path(found), must_be_complete=False)  # its files are downloaded later


def _tokenizer(name: str, found: _Found) -> Any:
    if Path(found.source).is_dir() and not has_tokenizer(Path(found.source)):
        raise ModelError(f"the folder {name!r} has no tokenizer (tokenizer.json)")
    with reading(partial(_cannot_load, name, "tokenizer", found.offline)):
        return transformers.AutoTokenizer.from_pretrained(found.source, **found.options)


def _written_config(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return config.json without transformers' defaults."""
    written, _ = transformers.PreTrainedConfig.get_config_dict(source, **options)
    return dict(written)


def _estimated(name: str, found: _Found, dtype: str, workload: Workload) -> tuple[MemoryEstimate, Machine]:
    """Return and log the memory that the model needs and that the machine has."""
    machine = this_machine()
    estimate = estimate_memory(found.decoder, getattr(torch, dtype), workload, machine.device)
    log.info(
        "memory_estimate",
        model=name,
        needs=estimate.description,
        has=machine.description,
        weights_gb=round(estimate.weights / 1e9, 3),
    )
    return estimate, machine


def _loaded(name: str, found: _Found, dtype: str, placement: Placement) -> LoadedModel:
    """Load the weights onto the devices of `placement`."""
    devices = device_map(found.bare, type(found.decoder.layers[0].module), placement)
    tokenizer = _tokenizer(name, found)
    with reading(partial(_cannot_load, name, "weights", found.offline)):
        causal_lm = load_weights(name, found.source, getattr(torch, dtype), device_map=devices, **found.options)
    causal_lm.requires_grad_(False).eval()
    unmap(causal_lm)
    decoder, identity = extract_decoder(causal_lm), _identity(found.source)
    return LoadedModel(causal_lm, tokenizer, decoder, identity, name, placement.fit_in_main_memory)


def _without_weights(name: str, found: _Found) -> LoadedModel:
    return LoadedModel(found.bare, _tokenizer(name, found), found.decoder, identity="", name=name)


def _identity(source: str) -> str:
    if Path(source).is_dir():
        return folder_identity(Path(source))
    # The hub's cache names each snapshot folder after its commit.
    return Path(transformers.utils.cached_file(source, "config.json", local_files_only=True)).parent.name


def _source(name: str, dtype: str) -> str:
    """Return the folder or hub name that transformers loads."""
    check_model(name)
    if name == SMOLLM2:
        return str(unpacked(smollm2_file(), dtype))  # unpacking takes ten seconds, a later load one
    path = expanded(name)
    if path.is_file():
        return str(unpacked(path, dtype))
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / FACTS).is_file():
            raise ModelError(only_for_llama_cpp(name))
        found = str(min(path.glob("*.gguf")))
        raise ModelError(f"the folder {name!r} holds a GGUF file and no config.json; pass the file, {found!r}")
    return str(path) if path.is_dir() else name


def _cannot_load(name: str, part: str, offline: bool, error: Exception) -> str:
    if offline and isinstance(error, OSError):
        return f"the model {name!r} is not on this machine and the hub cannot be reached; pass a folder, or `{SMOLLM2}`"
    return f"the model {name!r} cannot be loaded ({part}: {reason(error)}); {WHAT_TO_PASS}"
