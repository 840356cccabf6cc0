"""Writes the format `hf`: safetensors with sizes per layer, a config with these sizes, and a modeling file.

It loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` in transformers from 5.15 on, and
in the Transformers backend of vLLM from 0.28 on.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from gpu_worker.export.auxiliary_files import dense_config, write_auxiliary_files, write_json
from gpu_worker.export.weights import Weight, checkpoint_weights, save_weights, stored_weight
from gpu_worker.models.families import PRUNED
from gpu_worker.models.loading import LoadedModel
from gpu_worker.models.modeling import class_names, dense_type, module_name, render_modeling
from gpu_worker.progress import Progress, no_progress
from protocol.plans.plan import LayerPlan, Plan


def write_hf(model: LoadedModel, plan: Plan, folder: Path, progress: Progress = no_progress) -> None:
    """Write `model`, pruned to `plan`, into the empty `folder`. Raises ModelError for an unsupported family."""
    model_type = dense_type(model.causal_lm.config)
    code = render_modeling(model_type)
    (folder / f"{module_name(model_type)}.py").write_text(code, encoding="utf-8")
    write_json(folder / "config.json", _config(model, plan))
    save_weights(checkpoint_weights(model, lambda *place: _kept(model, *place)), folder, progress)
    write_auxiliary_files(model, folder)


def _config(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    """Return config.json of the pruned model: the dense sizes, and the sizes per layer that differ."""
    plain = dense_config(model)
    classes = class_names(plain["model_type"])
    module = module_name(plain["model_type"])
    return plain | {
        "architectures": [classes["AutoModelForCausalLM"]],
        "model_type": PRUNED + plain["model_type"],
        "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
        # Without it, loaders assume hidden size / heads, which now differs between layers.
        "head_dim": model.decoder.shape.head_dim,
        "per_layer_config": _per_layer(plan, plain),
    }


def _per_layer(plan: Plan, plain: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return the sizes that differ from the dense sizes, by layer.

    Keys are zero-padded, as transformers writes them.
    """
    digits = len(str(len(plan.layers) - 1))
    sizes = [{name: size for name, size in _sizes(layer).items() if size != plain[name]} for layer in plan.layers]
    return {str(i).zfill(digits): differing for i, differing in enumerate(sizes) if differing}


def _sizes(layer: LayerPlan) -> dict[str, int]:
    return {
        "num_attention_heads": layer.query_heads,
        "num_key_value_heads": layer.kv_heads,
        "intermediate_size": layer.mlp_channels,
    }


def _kept(model: LoadedModel, layer: int, projection: str, kind: str) -> Weight:
    """Return a projection's parameter, stored unchanged."""
    tensor: Tensor = getattr(getattr(model.decoder.layers[layer], projection), kind)
    return stored_weight(tensor.detach())
