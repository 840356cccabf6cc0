"""GGUF files of pruned models: what is in them, and that llama.cpp computes with them what transformers computes."""

import dataclasses
import logging
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import structlog
import torch
from torch import Tensor

from gpu_worker.llama_cpp.client import gguf_perplexity
from gpu_worker.llama_cpp.writer import check_gguf, write_gguf
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.pruning.calibration import calibrate
from gpu_worker.pruning.importance import wanda_sp
from gpu_worker.pruning.ordered_model import OrderedModel, PlanMismatchError
from protocol.errors import ModelError
from protocol.plans.plan import Plan, dense_plan, make_plan
from protocol.results.formats import GgufType
from tests.support.pruned_models import keep, scores_of
from tests.support.real_model import need_smollm2
from tests.support.root import ROOT
from tests.support.tiny_models import byte_tokenizer, tiny_model, tiny_windows

pytest.importorskip("xllamacpp")

from tests.support import llama_cpp

UNEVEN = keep((3, 1, 17), (1, 2, 48), (2, 2, 32))
"""Every layer another number of KV heads, of query heads and of channels."""
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32} | {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
MODELS = [
    pytest.param("llama", {}, id="grouped-query, tied"),
    pytest.param("llama", {"tied": False, "bias": True}, id="untied, biases"),
    pytest.param("llama", {"hidden_size": 48}, id="heads as wide as the hidden size"),
    pytest.param("llama", {"rope_parameters": LLAMA3_ROPE}, id="llama3 rope scaling"),
    pytest.param("llama", {"rope_parameters": LINEAR_ROPE}, id="linear rope scaling"),
    pytest.param("mistral", {"sliding_window": None}, id="mistral"),
    pytest.param("qwen2", {}, id="qwen2"),
]


def round_matrices(model: LoadedModel) -> None:
    """To what F16 can hold, so that the file has the same values."""
    for parameter in model.causal_lm.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.half().float())


def pruned(plan: Plan = UNEVEN, family: str = "llama", **options: Any) -> LoadedModel:
    """A tiny model pruned to `plan`."""
    model = dataclasses.replace(tiny_model(family, **options), tokenizer=byte_tokenizer())
    round_matrices(model)
    OrderedModel(model.decoder, scores_of(model)).apply(plan)
    return model


def write(model: LoadedModel, folder: Path, *, plan: Plan = UNEVEN, file_type: GgufType = "f16") -> Path:
    return write_gguf(model, plan, folder, file_type=file_type, name="tiny")


def greedy(model: LoadedModel, prompt: Sequence[int], count: int, ends: Sequence[int] = ()) -> list[int]:
    """The likeliest next token, `count` times, or until an end or two that are likeliest within rounding."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        logits = model.causal_lm(input_ids=torch.tensor([tokens])).logits[0, -1]
        (best, second), (token, _) = (each.tolist() for each in logits.topk(2))
        if best - second < 0.05 or token in ends:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("family", "options"), MODELS)
def test_llama_cpp_computes_the_logits_that_transformers_does(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = pruned(family=family, **options)
    windows = tiny_windows(2, 100)
    ours: Tensor = model.causal_lm(input_ids=windows).logits
    theirs = llama_cpp.logits(write(model, tmp_path), windows)
    # llama.cpp rounds what it multiplies F16 matrices with to F16 too.
    assert (theirs - ours).std() < 0.003 * ours.std()


def test_llama_cpp_goes_on_with_the_tokens_that_transformers_does(tmp_path: Path) -> None:
    model = pruned()
    agreed = 0
    with llama_cpp.serving(write(model, tmp_path)) as server:
        for prompt in tiny_windows(8, 9).tolist():
            expected = greedy(model, prompt, 20, ends=[model.tokenizer.eos_token_id])
            assert server.greedy(prompt, 20)[: len(expected)] == expected
            agreed += len(expected)
    assert agreed > 40


def test_the_dense_plan_is_written_as_well(tmp_path: Path) -> None:
    plan = dense_plan(tiny_model("llama").decoder.shape)
    model = pruned(plan)
    windows = tiny_windows(1, 50)
    path = write(model, tmp_path, plan=plan)
    assert gguf_perplexity(path, windows) == pytest.approx(perplexity(model.decoder, windows)[0], rel=1e-3)


def test_the_numbers_of_heads_and_channels_are_given_layer_by_layer(tmp_path: Path) -> None:
    path = write(pruned(rms_norm_eps=1e-3), tmp_path)
    assert path.name == "tiny-F16.gguf"
    assert "output.weight" not in llama_cpp.read_tensors(path), "a tied embedding is written once"
    for key, expected in {
        "general.architecture": "deci",
        "general.name": "tiny",
        "deci.block_count": 3,
        "deci.attention.head_count": [3, 2, 4],
        "deci.attention.head_count_kv": [3, 1, 2],
        "deci.feed_forward_length": [17, 48, 32],
        "deci.attention.key_length": 8,
        "deci.attention.value_length": 8,
        "deci.rope.dimension_count": 8,
        "deci.rope.freq_base": 10_000.0,
        "deci.embedding_length": 36,
        "deci.context_length": 256,
        "deci.vocab_size": 320,
        "deci.attention.layer_norm_rms_epsilon": pytest.approx(1e-3),
    }.items():
        assert llama_cpp.read_field(path, key) == expected, key


def test_every_tensor_holds_the_models_values_and_only_q_and_k_change_their_order(tmp_path: Path) -> None:
    model = pruned(tied=False, bias=True)
    tensors = llama_cpp.read_tensors(write(model, tmp_path))
    assert torch.equal(tensors.pop("token_embd.weight"), model.decoder.embedding.weight)  # type: ignore[arg-type]
    assert torch.equal(tensors.pop("output.weight"), model.decoder.head.weight)
    assert torch.equal(tensors.pop("output_norm.weight"), model.decoder.norm.weight)  # type: ignore[arg-type]
    for i, layer in enumerate(model.decoder.layers):
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        for name, linear in zip(names, layer.linears, strict=True):
            for kind, values in (("weight", linear.weight), ("bias", linear.bias)):
                found = tensors.pop(f"blk.{i}.{name}.{kind}")
                if name in ("attn_q", "attn_k"):  # per head of 8: row 0 of the first half, of the second, row 1 …
                    order = [8 * head + row for head in range(len(values) // 8) for row in (0, 4, 1, 5, 2, 6, 3, 7)]
                    values = values[order]
                assert torch.equal(found, values), (i, name, kind)
        module: Any = layer.module
        assert torch.equal(tensors.pop(f"blk.{i}.attn_norm.weight"), module.input_layernorm.weight)
        assert torch.equal(tensors.pop(f"blk.{i}.ffn_norm.weight"), module.post_attention_layernorm.weight)
    assert not tensors


def test_the_library_of_the_format_logs_nothing_of_a_hidden_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        write(pruned(), tmp_path)
    assert not caplog.records


def test_q8_0_leaves_rows_of_other_lengths_as_f16_and_says_so(tmp_path: Path) -> None:
    plan = keep((2, 1, 64), (1, 2, 33), (2, 2, 32))
    model = pruned(plan, hidden_size=64, query_heads=4, kv_heads=2, head_dim=16, channels=64)
    with structlog.testing.capture_logs() as logs:
        path = write(model, tmp_path, plan=plan, file_type="q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert [name for name, kind in kinds.items() if kind == "F16"] == ["blk.1.ffn_down.weight"]
    assert all(kind == "F32" for name, kind in kinds.items() if "norm" in name)
    (said,) = logs
    assert (said["tensors"], said["of"]) == (1, 22)
    assert said["event"] == "tensors_stay_f16" and "multiple_of" in said["advice"]
    windows = tiny_windows(2, 60)
    theirs, ours = llama_cpp.logits(path, windows), model.causal_lm(input_ids=windows).logits
    # Half a percent of rounding in every weight becomes several in the logits of a random model.
    assert (theirs - ours).std() < 0.15 * ours.std()


def test_q8_0_values_are_within_half_a_step_of_their_block(tmp_path: Path) -> None:
    plan = dense_plan(tiny_model("llama", hidden_size=96).decoder.shape)
    model = pruned(plan, hidden_size=96)
    found = llama_cpp.read_tensors(write(model, tmp_path, plan=plan, file_type="q8_0"))["token_embd.weight"]
    values: Any = model.decoder.embedding.weight
    step = values.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    # The step itself is kept in F16.
    assert ((found - values).unflatten(1, (-1, 32)).abs() <= step * (0.5 + 127 * 2**-11)).all()


def test_tensors_are_converted_and_written_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned()
    alive: list[int] = []
    seen: list[weakref.ref[np.ndarray[Any, Any]]] = []
    write_one = gguf.GGUFWriter.write_tensor_data

    def counting(self: Any, tensor: Any) -> None:
        seen.append(weakref.ref(tensor))
        alive.append(sum(reference() is not None for reference in seen))
        write_one(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", counting)
    write(model, tmp_path)
    assert len(alive) == 2 + 9 * 3
    assert set(alive) == {1}


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        ("qwen3", {}, "gguf does not support pruned models of the family 'qwen3'; it supports llama, mistral, qwen2"),
        ("mistral", {}, r"this model's sliding window \(9 tokens\)"),
        ("llama", {"hidden_act": "gelu"}, "only the activation silu, but this model has 'gelu'"),
        ("llama", {"rope_parameters": LINEAR_ROPE | {"rope_type": "dynamic"}}, "linear and llama3, .* has 'dynamic'"),
    ],
)
def test_what_gguf_cannot_carry_is_refused_before_anything_is_written(
    family: str, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    model = pruned(family=family, **options)
    with pytest.raises(ModelError, match=sentence):
        check_gguf(model)
    with pytest.raises(ModelError, match=sentence):
        write(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_pruned_to_another_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanMismatchError, match="layer 1 is not pruned to the plan"):
        write(pruned(keep((3, 1, 17), (1, 2, 47), (2, 2, 32))), tmp_path)
    with pytest.raises(PlanMismatchError, match="the plan is for 2 layers"):
        write(pruned(), tmp_path, plan=keep((3, 1, 17), (1, 2, 48)))


def test_values_beyond_f16_are_an_error(tmp_path: Path) -> None:
    model = pruned()
    model.decoder.layers[2].value.weight[0, 0] = 70_000
    with pytest.raises(ModelError, match=r"blk\.2\.attn_v\.weight has values that F16 cannot hold"):
        write(model, tmp_path)


SMOLLM2_TEXT = ROOT / "LICENSE"
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in 1987, there"]


@pytest.fixture(scope="module")
def smollm2() -> tuple[LoadedModel, Plan]:
    """The real model pruned by uniform 0.3 as a session prunes it, which takes no heads; some heads besides."""
    need_smollm2()
    model = load_model("smollm2", "float32")
    round_matrices(model)
    shape = model.decoder.shape
    layers = list(make_plan([0.3] * len(shape.layers), shape, granularity="layer").layers)
    layers[20] = layers[20].model_copy(update={"kv_heads": 2})
    layers[25] = layers[25].model_copy(update={"queries_per_kv": 2})
    plan = Plan(layers=tuple(layers))
    seen = calibrate(model.decoder, windows(model, 0, 4))
    scores = [wanda_sp(*each) for each in zip(model.decoder.layers, seen, shape.layers, strict=True)]
    OrderedModel(model.decoder, scores).apply(plan)
    return model, plan


def windows(model: LoadedModel, start: int, count: int, seqlen: int = 256) -> Tensor:
    """Windows of the licence's text."""
    tokens = model.tokenizer(SMOLLM2_TEXT.read_text())["input_ids"]
    return torch.tensor(tokens[start * seqlen : (start + count) * seqlen]).view(count, seqlen)


@pytest.mark.model
def test_smollm2_pruned_goes_on_in_llama_cpp_as_in_transformers_and_chats(
    smollm2: tuple[LoadedModel, Plan], tmp_path: Path
) -> None:
    model, plan = smollm2
    path = write(model, tmp_path, plan=plan)
    agreed = 0
    with llama_cpp.serving(path) as server:
        for prompt in PROMPTS:
            tokens = model.tokenizer(prompt)["input_ids"]
            assert server.tokenize(prompt) == tokens
            expected = greedy(model, tokens, 16, ends=model.tokenizer.all_special_ids)
            assert server.greedy(tokens, 16)[: len(expected)] == expected
            agreed += len(expected)
        assert len(server.chat("Who are you?", 16)) > 10
    assert agreed > 30


@pytest.mark.model
@pytest.mark.parametrize(("file_type", "within"), [("f16", 0.003), ("q8_0", 0.04), ("q4_k_m", 0.25)])
def test_smollm2_pruned_has_our_perplexity_in_llama_cpp(
    smollm2: tuple[LoadedModel, Plan], tmp_path: Path, file_type: GgufType, within: float
) -> None:
    # 8 bits change the loss of a token by a few percent either way; over thousands of tokens it evens out. Four or five
    # bits cost something.
    model, plan = smollm2
    text = windows(model, 4, 2)
    path = write(model, tmp_path, plan=plan, file_type=file_type)
    assert gguf_perplexity(path, text) == pytest.approx(perplexity(model.decoder, text)[0], rel=within)


def test_a_name_that_is_no_file_name_is_made_one(tmp_path: Path) -> None:
    path = write_gguf(pruned(), UNEVEN, tmp_path, file_type="f16", name="meta-llama/Llama 2 (7B), 30 %")
    assert path.name == "meta-llama-Llama-2-7B-30-F16.gguf"
    assert llama_cpp.read_field(path, "general.name") == "meta-llama/Llama 2 (7B), 30 %"
