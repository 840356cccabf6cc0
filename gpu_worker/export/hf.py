"""The format `hf`: safetensors with each layer's own sizes, a config that says them, and the file that builds them.

It loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` in transformers from 5.15 on, and in
the Transformers backend of vLLM from 0.28 on.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from gpu_worker.export.modeling import PREFIX, class_names, module_name, render_modeling
from gpu_worker.export.weights import Weight, as_it_is, checkpoint_weights, save_weights
from gpu_worker.families import head_dim_of
from gpu_worker.models import LoadedModel
from protocol.plan import LayerPlan, Plan


def write_hf(model: LoadedModel, plan: Plan, folder: Path) -> None:
    """Write `model`, which is pruned to `plan`, into the empty `folder`. Raises ModelError for an unsupported family."""
    model_type = model.causal_lm.config.model_type
    code = render_modeling(model_type)
    (folder / f"{module_name(model_type)}.py").write_text(code, encoding="utf-8")
    write_json(folder / "config.json", _config(model, plan))
    save_weights(checkpoint_weights(model, lambda *place: _kept(model, *place)), folder)
    write_companions(model, folder)


def plain_config(model: LoadedModel) -> dict[str, Any]:
    """config.json of the dense model as transformers would save it, without code of other people.

    The type is that of the weights in memory. An `auto_map` points at code that was not used to load the model.
    """
    config: dict[str, Any] = json.loads(model.causal_lm.config.to_json_string(use_diff=True))
    config.pop("auto_map", None)
    config["dtype"] = str(model.decoder.head.weight.dtype).removeprefix("torch.")
    return config


def write_companions(model: LoadedModel, folder: Path) -> None:
    """Write what belongs to a checkpoint beside weights and config: generation settings and tokenizer."""
    generation = getattr(model.causal_lm, "generation_config", None)
    if generation is not None:
        # Not `save_pretrained`: it refuses settings that older checkpoints are published with.
        (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content` to `file`, readable by people."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    """config.json of the pruned model: the dense sizes, and per layer what differs from them."""
    dense = model.causal_lm.config
    classes = class_names(dense.model_type)
    module = module_name(dense.model_type)
    whole = {name: getattr(dense, name) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
    return plain_config(model) | {
        "architectures": [classes["AutoModelForCausalLM"]],
        "model_type": PREFIX + dense.model_type,
        "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
        # Left out, it would be taken for hidden size / heads, which differs from layer to layer now.
        "head_dim": head_dim_of(dense),
        **whole,
        "per_layer_config": _per_layer(plan, whole),
    }


def _per_layer(plan: Plan, whole: dict[str, int]) -> dict[str, dict[str, int]]:
    """What differs from the dense sizes, by layer; keys are padded with noughts, as transformers writes them."""
    digits = len(str(len(plan.layers) - 1))
    sizes = [{name: size for name, size in _sizes(layer).items() if size != whole[name]} for layer in plan.layers]
    return {str(i).zfill(digits): differing for i, differing in enumerate(sizes) if differing}


def _sizes(layer: LayerPlan) -> dict[str, int]:
    return {
        "num_attention_heads": layer.query_heads,
        "num_key_value_heads": layer.kv_heads,
        "intermediate_size": layer.mlp_channels,
    }


def _kept(model: LoadedModel, layer: int, projection: str, kind: str) -> Weight:
    """A projection's parameter as it is in memory."""
    tensor: Tensor = getattr(getattr(model.decoder.layers[layer], projection), kind)
    return as_it_is(tensor.detach())
