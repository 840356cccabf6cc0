"""GGUF types of fewer bits: which tensor gets which, how far values move, and that llama.cpp computes with them."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import structlog
import torch

from gpu_worker.llama_cpp import quantisers as ggml
from gpu_worker.llama_cpp.tensor_types import MAIN, Kind, kinds_of, stored_kind, wanted_kind
from gpu_worker.llama_cpp.writer import check_gguf, write_gguf
from gpu_worker.models.loading import LoadedModel
from gpu_worker.pruning.ordered_model import OrderedModel
from protocol.errors import ModelError
from protocol.plans.plan import Plan, dense_plan
from protocol.results.formats import GgufType
from tests.support.pruned_models import keep, scores_of
from tests.support.tiny_models import byte_tokenizer, tiny_model, tiny_windows

pytest.importorskip("xllamacpp")

from tests.support import llama_cpp

MOST_ERROR: dict[GgufType, float] = {
    **{"q8_0": 0.006, "q6_k": 0.02, "q5_k_m": 0.04, "q5_1": 0.045},
    **{"q5_0": 0.05, "q4_k_m": 0.08, "q4_1": 0.09, "q4_0": 0.1},
}
WIDE = {"hidden_size": 256, "query_heads": 8, "kv_heads": 4, "head_dim": 32, "channels": 512, "layers": 2}
"""Every row a multiple of 256 long."""


def model_of(plan: Plan | None = None, **options: Any) -> LoadedModel:
    """A tiny model whose matrices are as small as a trained model's are, so that it does not blow up every rounding."""
    model = dataclasses.replace(tiny_model("llama", **(WIDE | options)), tokenizer=byte_tokenizer())
    for parameter in model.causal_lm.parameters():
        if parameter.dim() > 1:
            parameter.mul_(0.2)
    if plan is not None:
        OrderedModel(model.decoder, scores_of(model)).apply(plan)
    return model


def write(model: LoadedModel, folder: Path, file_type: GgufType, plan: Plan | None = None) -> Path:
    kept = dense_plan(model.decoder.shape) if plan is None else plan
    return write_gguf(model, kept, folder, file_type=file_type, name="tiny")


def kinds(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(("file_type", "most_error"), MOST_ERROR.items())
def test_values_move_no_further_than_the_bits_allow_and_llama_cpp_computes_with_them(
    file_type: GgufType, most_error: float, tmp_path: Path
) -> None:
    model = model_of()
    path = write(model, tmp_path, file_type)
    values: Any = model.decoder.layers[1].gate.weight
    found = llama_cpp.read_tensors(path)["blk.1.ffn_gate.weight"]
    assert most_error / 4 < (found - values).std() / values.std() < most_error
    windows = tiny_windows(1, 40)
    theirs, ours = llama_cpp.logits(path, windows), model.causal_lm(input_ids=windows).logits
    # Of several matrices in a row, and llama.cpp rounds what they are multiplied with to 8 bits.
    assert (theirs - ours).std() < (0.01 + 3 * most_error) * ours.std()
    assert llama_cpp.read_field(path, "general.file_type") == gguf.LlamaFileType[f"MOSTLY_{file_type.upper()}"]
    assert path.name == f"tiny-{file_type.upper()}.gguf"


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_both_libraries_quantise_to_the_same_bytes(kind: str) -> None:
    values = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).numpy()
    kind_ = gguf.GGMLQuantizationType[kind]
    assert np.array_equal(ggml.quantize(values, kind_), gguf.quantize(values, kind_))


def test_q4_k_m_is_llama_cpps_mixture(tmp_path: Path) -> None:
    """More bits for v and down of the first and the last eighth of the layers and each third between, and the head."""
    found = kinds(write(model_of(layers=16, tied=False), tmp_path, "q4_k_m"))
    with_more = {int(name.split(".")[1]) for name, kind in found.items() if "ffn_down" in name and kind == "Q6_K"}
    assert with_more == {0, 1, 4, 7, 10, 13, 14, 15}
    assert with_more == {int(name.split(".")[1]) for name, kind in found.items() if "attn_v" in name and kind == "Q6_K"}
    assert found["output.weight"] == "Q6_K"
    assert found["token_embd.weight"] == "Q4_K"
    assert Counter(found.values()) == {"Q4_K": 16 * 5 + 2 * 8 + 1, "Q6_K": 2 * 8 + 1, "F32": 16 * 2 + 1}


def test_values_shared_by_eight_heads_in_a_model_of_eighty_layers_get_more_bits() -> None:
    assert wanted_kind("q4_k_m", "blk.11.attn_v.weight", 256, 80, is_head=False) == Kind.Q5_K
    assert wanted_kind("q4_k_m", "blk.12.attn_v.weight", 256, 80, is_head=False) == Kind.Q6_K
    assert wanted_kind("q4_k_m", "blk.11.attn_q.weight", 256, 80, is_head=False) == Kind.Q4_K


def test_a_tied_embedding_has_the_bits_of_a_head(tmp_path: Path) -> None:
    assert kinds(write(model_of(), tmp_path, "q4_0"))["token_embd.weight"] == "Q6_K"


@pytest.mark.parametrize(
    ("wanted", "columns", "stored"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 96, "Q5_0"),
        ("Q5_K", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q4_K", 48, "F16"),
        ("Q4_0", 48, "F16"),
        ("F16", 7, "F16"),
    ],
)
def test_rows_that_a_type_cannot_hold_take_another(wanted: str, columns: int, stored: str) -> None:
    kind = gguf.GGMLQuantizationType
    assert stored_kind(kind[wanted], columns) == kind[stored]


def test_odd_widths_fall_back_matrix_by_matrix_and_the_log_says_what_helps(tmp_path: Path) -> None:
    plan = keep((4, 2, 288), (4, 2, 33))
    model = model_of(plan)
    with structlog.testing.capture_logs() as logs:
        path = write(model, tmp_path, "q4_k_m", plan)
    found = kinds(path)
    assert (found["blk.0.ffn_down.weight"], found["blk.1.ffn_down.weight"]) == ("Q5_0", "F16")
    assert found["blk.0.ffn_gate.weight"] == "Q4_K"
    said = {each["event"]: each for each in logs}
    assert said["tensors_stay_f16"]["tensors"] == said["tensors_fall_back"]["tensors"] == 1
    assert said["tensors_stay_f16"]["advice"].endswith("multiple_of 32 avoids it")
    assert said["tensors_fall_back"]["advice"].endswith("multiple_of 256 avoids it")
    windows = tiny_windows(1, 40)
    theirs, ours = llama_cpp.logits(path, windows), model.causal_lm(input_ids=windows).logits
    assert (theirs - ours).std() < 0.2 * ours.std()


def test_the_models_own_sizes_are_not_blamed_on_the_plan(tmp_path: Path) -> None:
    model = model_of(hidden_size=96, query_heads=3, kv_heads=3)
    with structlog.testing.capture_logs() as logs:
        write(model, tmp_path, "q4_k_m")
    (said,) = logs
    assert said["event"] == "tensors_fall_back" and said["tensors"] == 2 * 6
    assert said["advice"].endswith("the model's hidden size")


@pytest.mark.parametrize("file_type", [*MOST_ERROR])
def test_what_is_said_of_a_model_beforehand_is_what_is_written(file_type: GgufType, tmp_path: Path) -> None:
    model = model_of(tied=False, layers=1)
    written = set(kinds(write(model, tmp_path, file_type)).values()) - {"F32"}
    assert {kind.name for kind in kinds_of(file_type, model.decoder.shape)} == written
    assert MAIN[file_type].name in written


def test_k_quants_without_llama_cpp_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    ggml.ggml.cache_clear()
    with pytest.raises(ModelError, match=r"pip install '\.\[local\]'"):
        check_gguf(model_of(), "q4_k_m")
    with pytest.raises(ModelError, match="xllamacpp"):
        write(model_of(), tmp_path, "q4_k_m")
    assert not list(tmp_path.iterdir())
    check_gguf(model_of(), "q8_0")


def test_values_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    model = model_of()
    model.decoder.layers[1].value.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"blk\.1\.attn_v\.weight has values that Q6_K cannot hold"):
        write(model, tmp_path, "q4_k_m")
