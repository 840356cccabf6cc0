"""GGUF files of pruned models: what is in them, and that llama.cpp computes with them what transformers computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_worker.calibration import calibrate
from gpu_worker.export.gguf import write_gguf
from gpu_worker.importance import wanda_sp
from gpu_worker.models import LoadedModel
from gpu_worker.pruning import OrderedModel, PlanMismatchError
from protocol.errors import ModelError
from protocol.plan import LayerPlan, Plan, dense_plan
from tests.tiny_models import byte_tokenizer, tiny_llama, tiny_windows

pytest.importorskip("xllamacpp")

from tests import llama_cpp

UNEVEN = Plan(
    layers=(
        LayerPlan(kv_heads=3, queries_per_kv=1, mlp_channels=17),
        LayerPlan(kv_heads=1, queries_per_kv=2, mlp_channels=48),
        LayerPlan(kv_heads=2, queries_per_kv=2, mlp_channels=32),
    )
)


def pruned(plan: Plan = UNEVEN, **options: Any) -> LoadedModel:
    """A tiny model pruned to `plan`, its matrices rounded to what F16 can hold."""
    model = tiny_llama(tokenizer=byte_tokenizer(), **options)
    seen = calibrate(model.decoder, tiny_windows(3, 16, seed=1))
    scores = [wanda_sp(*each) for each in zip(model.decoder.layers, seen, model.decoder.shape.layers, strict=True)]
    for parameter in model.causal_lm.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.half().float())
    OrderedModel(model.decoder, scores).apply(plan)
    return model


def test_x(tmp_path: Path) -> None:
    model = pruned()
    path = write_gguf(model, UNEVEN, tmp_path, file_type="f16", name="tiny")
    windows = tiny_windows(2, 64)
    ours = model.causal_lm(input_ids=windows).logits
    theirs = llama_cpp.logits(path, windows)
    print((ours-theirs).abs().max(), ours.std())
