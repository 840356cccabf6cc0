import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import gpu_worker.export.weights as weights_module
import gpu_worker.export.writer as exporting_module
from gpu_worker.export.hf import write_hf
from gpu_worker.export.padded import write_padded
from gpu_worker.export.writer import check_formats
from gpu_worker.models.families import FAMILIES, extract_decoder
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.models.modeling import MODELINGS, register_pruned_classes, render_modeling
from protocol.errors import ModelError
from protocol.plans.plan import Plan, count_parameters, dense_plan, make_plan
from tests.support.exports import UNEVEN, export, laid_out_as_in_a_file, loaded_elsewhere, pruned
from tests.support.load_export import NEW_TOKENS, greedy
from tests.support.pruned_models import keep
from tests.support.real_model import need_smollm2
from tests.support.tiny_models import byte_tokenizer, tiny_model, tiny_windows

MODELS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    "untied": {"family": "llama", "tied": False},
    "untied phi3": {"family": "phi3", "tied": False},
    "biases": {"family": "llama", "bias": True},
    "multi-head": {"family": "mistral", "query_heads": 3, "kv_heads": 3},
}
TOKENS = tiny_windows(2, 24, seed=5)


@dataclass(frozen=True)
class Exported:
    """A pruned model in memory, its folder, and what the folder computes elsewhere."""

    model: LoadedModel
    folder: Path
    elsewhere: dict[str, Any]

    @property
    def logits(self) -> Tensor:
        logits: Tensor = self.model.causal_lm(input_ids=TOKENS).logits
        return logits


def plan_for(options: dict[str, Any]) -> Plan:
    return keep((2, 1, 20), (3, 1, 48), (1, 1, 7)) if options.get("query_heads") == 3 else UNEVEN


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every model exported, and all of them loaded by one process that knows nothing of us."""
    place = tmp_path_factory.mktemp("exports")
    plans = {name: plan_for(options) for name, options in MODELS.items()}
    models = {name: pruned(tiny_model(**options), plans[name]) for name, options in MODELS.items()}
    folders = {name: export(model, "hf", place / name, plans[name]) for name, model in models.items()}
    results = loaded_elsewhere(list(folders.values()), TOKENS, place)
    return {name: Exported(models[name], folders[name], results[folders[name]]) for name in MODELS}


@pytest.fixture(params=MODELS)
def exported(request: pytest.FixtureRequest, exports: dict[str, Exported]) -> Exported:
    return exports[request.param]


def tensors_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return set(opened.keys())


def config_in(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_plain_transformers_computes_what_the_worker_does(exported: Exported) -> None:
    """And so does the body alone."""
    assert torch.allclose(exported.elsewhere["logits"], exported.logits, atol=1e-4)
    hidden = exported.model.decoder.body(input_ids=TOKENS).last_hidden_state
    assert torch.allclose(exported.elsewhere["hidden"], hidden, atol=1e-4)


def test_what_is_removed_is_gone(exported: Exported) -> None:
    assert exported.elsewhere["class"].startswith("Pruned") and exported.elsewhere["refused"]  # without trust
    assert exported.elsewhere["parameters"] == sum(p.numel() for p in exported.model.causal_lm.parameters())


def test_weights_are_written_bit_for_bit_in_their_type(tmp_path: Path) -> None:
    model = pruned(tiny_model("llama", dtype=torch.bfloat16))
    folder = export(model, "hf", tmp_path / "out")
    assert config_in(folder)["dtype"] == "bfloat16"
    with safe_open(folder / "model.safetensors", "pt") as opened:
        written = opened.get_tensor("model.layers.0.mlp.down_proj.weight")
    assert written.dtype == torch.bfloat16 and torch.equal(written, model.decoder.layers[0].down.weight)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_text_is_the_workers_with_either_cache(exported: Exported, cache: str) -> None:
    assert torch.equal(exported.elsewhere[cache], greedy(exported.model.causal_lm, TOKENS))


def test_the_attention_implementation_can_be_changed(exported: Exported) -> None:
    assert exported.elsewhere["implementations"] == {"eager"}
    exported.model.causal_lm.set_attn_implementation("eager")
    expected = exported.logits
    exported.model.causal_lm.set_attn_implementation("sdpa")
    assert torch.allclose(exported.elsewhere["eager"], expected, atol=1e-4)


def test_a_loaded_model_can_be_saved_and_loaded_again(exported: Exported) -> None:
    assert torch.equal(exported.elsewhere["again"], exported.elsewhere["logits"])
    assert torch.equal(exported.elsewhere["hidden again"], exported.elsewhere["hidden"])


def test_a_head_that_is_the_embedding_is_written_once(exports: dict[str, Exported]) -> None:
    assert "lm_head.weight" not in tensors_in(exports["llama"].folder)
    assert "lm_head.weight" in tensors_in(exports["untied"].folder)


def test_the_tensors_have_the_names_of_the_family(exports: dict[str, Exported]) -> None:
    for family in FAMILIES:
        dense = transformers.AutoModelForCausalLM.from_config(tiny_model(family).causal_lm.config)
        names = set(dense.state_dict()) - {"lm_head.weight"}
        assert tensors_in(exports[family].folder) == names


def test_the_config_says_what_each_layer_keeps(exports: dict[str, Exported]) -> None:
    config = config_in(exports["llama"].folder)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (6, 3, 48)
    assert config["head_dim"] == 8
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 20},
        "1": {"num_attention_heads": 3},
        "2": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 7},
    }


def test_the_config_names_the_classes_for_every_loader(exports: dict[str, Exported]) -> None:
    for family in FAMILIES:
        config = config_in(exports[family].folder)
        module = f"modeling_pruned_{family}"
        classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        assert {auto: name.partition(".")[0] for auto, name in config["auto_map"].items()} == dict.fromkeys(
            classes, module
        )
        assert config["model_type"] == f"pruned_{family}"


def test_layer_numbers_are_padded_so_that_they_sort(tmp_path: Path) -> None:
    """And settings are kept that transformers would refuse to save."""
    plan = keep(*[(1, 1, 8)] * 11)
    model = pruned(tiny_model("llama", layers=11), plan)
    model.causal_lm.generation_config.temperature = 0.9  # without do_sample, as Vicuna is published
    write_hf(model, plan, tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.9
    assert list(config_in(tmp_path)["per_layer_config"]) == [f"{i:02}" for i in range(11)]


def test_a_plan_that_removes_nothing_is_exported_too(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    plan = dense_plan(model.decoder.shape)
    results = loaded_elsewhere([export(pruned(model, plan), "hf", tmp_path / "out", plan)], TOKENS, tmp_path)
    expected = model.causal_lm(input_ids=TOKENS).logits
    assert torch.allclose(results[tmp_path / "out"]["logits"], expected, atol=1e-4)


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "SHARD_SIZE", "40KB")
    model = pruned(tiny_model("llama"))
    folder = export(model, "hf", tmp_path / "out")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 50_000 for shard in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.causal_lm.parameters())
    results = loaded_elsewhere([folder], TOKENS, tmp_path)[folder]
    assert torch.allclose(results["logits"], model.causal_lm(input_ids=TOKENS).logits, atol=1e-4)


def test_a_model_on_a_gpu_is_refused_where_main_memory_has_no_room_for_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    size = sum(p.nbytes for p in model.causal_lm.parameters())
    monkeypatch.setattr(exporting_module, "main_memory", lambda: size - 1)
    check_formats(model, ("hf",))
    elsewhere = LoadedModel(model.causal_lm, byte_tokenizer(), extract_decoder(model.causal_lm.to("meta")), "")
    with pytest.raises(ModelError, match=r"writing the format padded needs about 0\.2 MB of main memory where"):
        check_formats(elsewhere, ("padded",))
    check_formats(elsewhere, ("gguf",))
    monkeypatch.setattr(exporting_module, "SHARD_SIZE", size - 1)
    check_formats(elsewhere, ("hf",))


@pytest.mark.parametrize("family", MODELINGS)
def test_the_modeling_file_imports_nothing_but_torch_and_transformers(family: str) -> None:
    tree = ast.parse(render_modeling(family))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    sources = {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert all(isinstance(node, ast.ImportFrom) and node.level == 0 for node in imports)
    assert set(MODELINGS) == set(FAMILIES)
    assert {str(source).partition(".")[0] for source in sources} == {"huggingface_hub", "torch", "transformers"}


@pytest.mark.parametrize("family", MODELINGS)
def test_the_modeling_file_is_short_and_tidy(family: str) -> None:
    code = render_modeling(family)
    assert len(code.splitlines()) < 110
    for command in (["format", "--check"], ["check", "--select", "E,F,W,I,N,UP,B"]):
        tool = [sys.executable, "-m", "ruff", *command, "--line-length", "120", "-"]
        done = subprocess.run(tool, input=code, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "write"), [("hf", write_hf), ("padded", write_padded)])
def test_an_unsupported_family_is_named_with_the_format(tmp_path: Path, name: str, write: Any) -> None:
    model = pruned(tiny_model("llama"))
    model.causal_lm.config.model_type = "gpt2"
    with pytest.raises(ModelError, match=f"'gpt2' cannot be exported as {name}; supported model types: ernie4_5, ex"):
        write(model, UNEVEN, tmp_path)


@pytest.mark.model
def test_smollm2_is_the_same_model_elsewhere(tmp_path: Path) -> None:
    need_smollm2()
    model = load_model("smollm2", "bfloat16")
    tokens = model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    uniform = make_plan([0.3] * len(model.decoder.layers), model.decoder.shape)
    fewer_heads = {"kv_heads": 2, "queries_per_kv": 2}
    plan = Plan(
        layers=tuple(kept.model_copy(update=fewer_heads if i % 3 else {}) for i, kept in enumerate(uniform.layers))
    )
    folder = export(pruned(model, plan), "hf", tmp_path / "out", plan)
    laid_out_as_in_a_file(model)
    results = loaded_elsewhere([folder], tokens, tmp_path)[folder]
    assert torch.equal(results["logits"], model.causal_lm(input_ids=tokens).logits)
    text = model.tokenizer.decode(greedy(model.causal_lm, tokens)[0])
    assert results["text"] == text and text.startswith("The capital of France is")
    assert results["parameters"] == count_parameters(plan, model.decoder.shape).total_after


def test_vllm_writes_the_same_text(exports: dict[str, Exported]) -> None:
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    if not torch.cuda.is_available():
        pytest.skip("vLLM serves the Transformers backend on a GPU")
    exported = exports["qwen3"]
    engine = vllm.LLM(str(exported.folder), trust_remote_code=True, model_impl="transformers", skip_tokenizer_init=True)
    prompt = {"prompt_token_ids": TOKENS[0].tolist()}
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    (answer,) = engine.generate([prompt], settings)
    assert list(answer.outputs[0].token_ids) == exported.elsewhere["dynamic"][0, TOKENS.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_export_can_be_pruned_and_exported_again(exports: dict[str, Exported], tmp_path: Path, family: str) -> None:
    register_pruned_classes()
    causal_lm = transformers.AutoModelForCausalLM.from_pretrained(exports[family].folder)
    causal_lm.requires_grad_(False)
    plan = keep((1, 1, 10), (2, 1, 30), (1, 1, 5))
    model = pruned(LoadedModel(causal_lm, None, extract_decoder(causal_lm), "again"), plan)
    folders = [export(model, "hf", tmp_path / "hf", plan), export(model, "padded", tmp_path / "padded", plan)]
    for results in loaded_elsewhere(folders, TOKENS, tmp_path).values():
        assert torch.allclose(results["logits"], causal_lm(input_ids=TOKENS).logits, atol=1e-4)
