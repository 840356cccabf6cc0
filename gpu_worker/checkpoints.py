"""What is checked of a checkpoint's config before its weights are loaded, and of the weights that were."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from gpu_worker.export.trusted import register_pruned_classes
from gpu_worker.families import PRUNED, family_of
from protocol.errors import ModelError


def check_config(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a model that is known to be of no use here from what its config.json says (`config`).

    Transformers has the supported families itself, and a folder that Self-Pruner exported is loaded with this version's
    own classes, so that no code from beside the weights is ever run.
    """
    family_of(SimpleNamespace(model_type=config.get("model_type")))
    if str(config.get("model_type")).startswith(PRUNED):
        register_pruned_classes()
    check_plain(name, config)


def check_plain(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError where the weights are quantised: packed numbers cannot be scored, ordered or sliced."""
    packing = config.get("quantization_config")
    if packing:
        raise ModelError(
            f"the weights of {name!r} are quantised ({quantisation_method(packing)}) and cannot be pruned; "
            "pass the unquantised model"
        )


def quantisation_method(packing: Mapping[str, Any]) -> str:
    """What a `quantization_config` calls its method; the oldest of bitsandbytes say only how many bits."""
    named = packing.get("quant_method")
    if named:
        return str(named)
    return "bitsandbytes" if packing.get("load_in_8bit") or packing.get("load_in_4bit") else "unknown method"


def load_weights(name: str, source: str, dtype: torch.dtype, **options: Any) -> Any:
    """The causal language model of a folder or hub name, by transformers' loader with these `options`.

    Raises ModelError where it would have made weights up: it goes on with random numbers in the gaps.
    """
    # Weights of another size are told apart below, with a sentence.
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    lacking = sorted(str(key) for key in report["missing_keys"])
    lacking += sorted(str(key[0]) for key in report["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{name!r} does not hold the weights that its config asks for: {len(lacking)} are missing or of another "
            f"size, such as {lacking[0]!r}; pass the plain, unquantised model without adapters"
        )
    return loaded
