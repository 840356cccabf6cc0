"""Renders the modeling file of an exported model, which transformers runs to build the model.

transformers stores sizes per layer in a config (`per_layer_config`) but builds every layer from the global sizes. The
file adds only the missing step, so that users can read it before they trust it. All exports of a family have the same
file, because it contains no version or date.
"""

import sys
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import ModuleType
from typing import Any

import transformers
from jinja2 import Environment, StrictUndefined

from gpu_worker.models.families import FAMILIES, PRUNED
from protocol.errors import ModelError


@dataclass(frozen=True)
class Modeling:
    """Names of a family's classes in transformers, and differences in their construction."""

    package: str
    """Package under `transformers.models`."""
    title: str
    classes: str
    """Prefix of the family's classes."""
    text: str = ""
    """Part of the class names between the prefix and `Model` or `Config`, for families that have other modalities."""
    scaled_embedding: bool = False
    """Whether the embedding is scaled by √(hidden size)."""
    sliding_flag: bool = False
    """Whether the model's constructor stores a flag that says if any layer has a sliding window."""


MODELINGS = {
    "llama": Modeling(package="llama", title="A Llama", classes="Llama"),
    "mistral": Modeling(package="mistral", title="A Mistral", classes="Mistral"),
    "qwen2": Modeling(package="qwen2", title="A Qwen2", classes="Qwen2", sliding_flag=True),
    "qwen3": Modeling(package="qwen3", title="A Qwen3", classes="Qwen3", sliding_flag=True),
    "gemma3_text": Modeling(package="gemma3", title="A Gemma 3", classes="Gemma3", text="Text", scaled_embedding=True),
    "phi3": Modeling(package="phi3", title="A Phi-3", classes="Phi3"),
    "smollm3": Modeling(package="smollm3", title="A SmolLM3", classes="SmolLM3", sliding_flag=True),
    "seed_oss": Modeling(package="seed_oss", title="A Seed-OSS", classes="SeedOss"),
    "ernie4_5": Modeling(package="ernie4_5", title="An ERNIE 4.5", classes="Ernie4_5"),
    "hunyuan_v1_dense": Modeling(package="hunyuan_v1_dense", title="A Hunyuan", classes="HunYuanDenseV1"),
    "exaone4": Modeling(package="exaone4", title="An EXAONE 4", classes="Exaone4"),
}
"""Modeling data by the `model_type` of the dense model."""


def modeling_of(model_type: str, fmt: str = "hf") -> Modeling:
    """Return the entry for a dense model's `model_type`. Raises ModelError for an unsupported type."""
    if model_type not in MODELINGS:
        raise ModelError(
            f"models of type {model_type!r} cannot be exported as {fmt}; supported model types: "
            f"{', '.join(sorted(MODELINGS))}"
        )
    return MODELINGS[model_type]


def dense_type(config: Any) -> str:
    """Return the `model_type` of the dense model, also for the config of an exported model."""
    return str(config.model_type).removeprefix(PRUNED)


def module_name(model_type: str) -> str:
    """Return the name of the modeling file for a dense model of `model_type`, without `.py`."""
    return f"modeling_{PRUNED}{model_type}"


def class_names(model_type: str) -> dict[str, str]:
    """Return the modeling file's classes by the auto class of transformers that loads them."""
    family = modeling_of(model_type)
    pruned = _pruned_prefix(family)
    return {
        "AutoConfig": f"{pruned}Config",
        # vLLM's Transformers backend loads this class.
        "AutoModel": f"{pruned}Model",
        "AutoModelForCausalLM": f"{pruned}ForCausalLM",
    }


def _pruned_prefix(family: Modeling) -> str:
    """Return the prefix of the modeling file's classes."""
    return f"Pruned{family.classes}{family.text}".replace("_", "")


def render_modeling(model_type: str) -> str:
    """Return the modeling file for a dense model of `model_type`. Raises ModelError for an unsupported type."""
    family = modeling_of(model_type)
    prefix = family.classes
    names = {
        "model": f"{prefix}{family.text}Model",
        "causal_lm": f"{prefix}ForCausalLM",
        "base": f"{prefix}PreTrainedModel",
        "decoder_layer": f"{prefix}DecoderLayer",
        "norm": f"{prefix}RMSNorm",
        "rotary": f"{prefix}RotaryEmbedding",
    }
    if family.scaled_embedding:
        names["scaled_embedding"] = f"{prefix}{family.text}ScaledWordEmbedding"
    template = _environment().from_string(
        resources.files("gpu_worker.models").joinpath("modeling_pruned.py.j2").read_text(encoding="utf-8")
    )
    return template.render(
        {"scaled_embedding": None} | names,
        imports=sorted(names.values()),
        package=family.package,
        title=family.title,
        config=f"{prefix}{family.text}Config",
        pruned=_pruned_prefix(family),
        model_type=PRUNED + model_type,
        sliding_flag=family.sliding_flag,
        # Fused attention splits its one projection by the number of heads in the config.
        fused=FAMILIES[model_type].fused_attention is not None,
    )


def _environment() -> Environment:
    return Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )


@cache
def register_pruned_classes() -> None:
    """Register the model types of exported folders with transformers' auto classes, using this version's own code."""
    for model_type in MODELINGS:
        module = _built(model_type)
        names = class_names(model_type)
        config = getattr(module, names["AutoConfig"])
        transformers.AutoConfig.register(PRUNED + model_type, config)
        for auto in ("AutoModel", "AutoModelForCausalLM"):
            getattr(transformers, auto).register(config, getattr(module, names[auto]))


def _built(model_type: str) -> ModuleType:
    """Execute the rendered modeling file and return it as a module."""
    name = f"{__package__}.{module_name(model_type)}"
    module = ModuleType(name)
    # The decorators of the file's classes look up this module.
    sys.modules[name] = module
    exec(compile(render_modeling(model_type), f"<{name}>", "exec"), module.__dict__)
    return module
