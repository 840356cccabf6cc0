"""Writes the files of a checkpoint other than its weights: config, generation settings, tokenizer."""

import json
from pathlib import Path
from typing import Any

from gpu_worker.models.loading import LoadedModel
from gpu_worker.models.modeling import dense_type, modeling_of


def dense_config(model: LoadedModel) -> dict[str, Any]:
    """Return config.json of the dense model, as transformers would save it, with the dtype of the weights in memory.

    For an exported model that was loaded again, this is the config of the dense model it was pruned from. `auto_map` is
    removed, because it refers to code that was not used to load the model.
    """
    source = model.causal_lm.config
    config: dict[str, Any] = json.loads(source.to_json_string(use_diff=True))
    config.pop("auto_map", None)
    config.pop("per_layer_config", None)
    model_type = dense_type(source)
    return config | {
        "architectures": [f"{modeling_of(model_type).classes}ForCausalLM"],
        "model_type": model_type,
        "dtype": str(model.decoder.head.weight.dtype).removeprefix("torch."),
    }


def write_auxiliary_files(model: LoadedModel, folder: Path) -> None:
    """Write generation settings and tokenizer into `folder`, if the model has them."""
    generation = getattr(model.causal_lm, "generation_config", None)
    if generation is not None:
        # Not `save_pretrained`, which refuses settings that older checkpoints were published with.
        (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content` to `file` as indented JSON."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
