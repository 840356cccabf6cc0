import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gpu_worker.models.loading as module
from gpu_worker.models.families import FAMILIES
from gpu_worker.models.loading import LoadedModel, load_model, load_side_by_side
from gpu_worker.models.machine import Machine
from gpu_worker.models.memory import Workload, estimate_memory
from protocol.errors import ModelError, UsageError
from protocol.results.formats import Format
from protocol.runtime import logs
from tests.support.exports import export, pruned
from tests.support.real_model import need_smollm2
from tests.support.tiny_models import (
    byte_tokenizer,
    change_config,
    save_tiny_folder,
    tiny_llama,
    tiny_model,
    tiny_windows,
)


def export_with_tokenizer(model: LoadedModel, format_: Format, folder: Path) -> Path:
    out = export(model, format_, folder / "out")
    byte_tokenizer().save_pretrained(out)
    return out


def test_what_the_model_needs_is_logged_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: Machine((), 100_000))
    logs.configure(json_lines=True)
    with pytest.raises(ModelError, match=r"too large for this machine: it needs about 0\.2 MB for weights"):
        load_model(str(save_tiny_folder(tmp_path)), "float32")
    event = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert event["event"] == "memory_estimate"
    assert event["model"] == str(tmp_path)
    assert event["needs"].startswith("about 0.2 MB for weights")
    assert event["has"] == "the main memory has 0.1 MB available and there is no GPU"


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The device map of each model that is loaded; it is loaded onto the CPU."""
    told: list[Any] = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_on_the_cpu(*args: Any, device_map: Any, **options: Any) -> Any:
        told.append(device_map)
        return load(*args, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_on_the_cpu)
    return told


@pytest.mark.parametrize(
    ("gpus", "expected"), [((), None), ((10**9,), {"": "cuda:0"}), ((10**6, 10**9), {"": "cuda:1"})]
)
def test_the_loader_is_told_the_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    maps: list[Any],
    gpus: tuple[int, ...],
    expected: dict[str, str] | None,
) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: Machine(gpus, 10**9))
    load_model(str(save_tiny_folder(tmp_path)), "float32")
    assert maps == [expected]


@pytest.mark.parametrize(("room", "expected"), [((2.1, 1.1), {0}), ((1.1, 2.1), {1}), ((1.6, 1.6), {0, 1})])
def test_models_to_be_compared_go_to_the_same_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maps: list[Any], room: tuple[float, ...], expected: set[int]
) -> None:
    """`room` is that for weights on each GPU, in models."""
    names = [str(save_tiny_folder(tmp_path / name, layers=8)) for name in ("dense", "pruned")]
    workload = Workload(seqlen=16, keeps_kv_cache=True)
    one = estimate_memory(tiny_llama(layers=8).decoder, torch.float32, workload, "cuda")
    gpus = tuple(one.activations + int(share * one.weights) for share in room)
    monkeypatch.setattr(module, "this_machine", lambda: Machine(gpus, 10**9))
    load_side_by_side(names, "float32", workload)
    used = [{int(str(device).removeprefix("cuda:")) for device in each.values()} for each in maps]
    assert used == [expected, expected]


def test_models_that_do_not_fit_together_are_refused_before_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(save_tiny_folder(tmp_path))
    workload = Workload(seqlen=16)
    one = estimate_memory(tiny_llama().decoder, torch.float32, workload, "cpu")
    monkeypatch.setattr(module, "this_machine", lambda: Machine((), one.activations + 2 * one.weights - 1))
    monkeypatch.setattr(module, "load_weights", None)
    with pytest.raises(ModelError, match="the 2 models together are too large for this machine: they need about"):
        load_side_by_side([name, name], "float32", workload)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_loaded_from_a_folder_as_what_was_saved(tmp_path: Path, family: str) -> None:
    model = load_model(str(save_tiny_folder(tmp_path, family, seed=2)), "float32")
    windows = tiny_windows(2, 24)
    expected = tiny_model(family, seed=2).causal_lm(input_ids=windows).logits
    assert torch.allclose(model.causal_lm(input_ids=windows).logits, expected, atol=1e-5)
    assert model.decoder.shape.family == family
    assert model.tokenizer.decode(model.tokenizer("Wörter\n")["input_ids"]) == "Wörter\n"
    assert not model.causal_lm.training
    assert {(p.requires_grad, p.dtype) for p in model.causal_lm.parameters()} == {(False, torch.float32)}


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(save_tiny_folder(tmp_path))
    with pytest.raises(ModelError, match="the model name is empty; pass a model's folder"):
        load_model(name, "float32")


@pytest.mark.parametrize(
    ("name", "why"), [("a" * 300, "File name too long"), ("~nobody-of-this-name/model", "no home folder")]
)
def test_a_name_that_cannot_be_a_path_is_refused(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        load_model(name, "float32")


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(ModelError, match=r"there is no folder '\./nowhere'"):
        load_model("./nowhere", "float32")


def test_a_hub_name_without_the_hub_says_what_to_pass_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "hub_reachable", lambda: False)
    with pytest.raises(ModelError, match="the hub cannot be reached; pass a folder, or `smollm2`"):
        load_model("nobody/no-model", "float32")


def test_an_unsupported_family_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"models of type 'gpt2' cannot be pruned; supported model types: .*llama"):
        load_model(str(tmp_path), "float32")


def test_a_checkpoint_of_the_older_format_is_loaded(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path)
    expected = load_model(str(folder), "float32").causal_lm
    torch.save(expected.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = load_model(str(folder), "float32").causal_lm
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)


def test_the_longest_text_is_what_the_config_says(tmp_path: Path) -> None:
    folder = save_tiny_folder(tmp_path)
    assert load_model(str(folder), "float32").longest_positions == 256
    change_config(folder, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert load_model(str(folder), "float32").longest_positions == 1024


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere.gguf", "there is no file 'nowhere.gguf'"),
        ("text.txt", "is a file but not a GGUF file; pass a model's folder"),
        ("empty", "has no config.json, so it holds no model"),
        ("llama", r"holds a GGUF file and no config.json; pass the file, 'llama/model\.gguf'$"),
        ("exported", r"is a pruned export for llama\.cpp, .*; pass the hf or the padded export of the same model$"),
    ],
)
def test_what_is_no_model_is_refused_with_what_to_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").touch()
    Path("empty").mkdir()
    for folder in ("llama", "exported"):
        Path(folder).mkdir()
        Path(folder, "model.gguf").touch()
    Path("exported/selfpruner.json").touch()
    with pytest.raises(ModelError, match=sentence):
        load_model(name, "float32")


@pytest.mark.parametrize("format_", ["hf", "padded"])
def test_an_export_is_measured_as_what_it_was_written_from(tmp_path: Path, format_: Format) -> None:
    original = pruned(tiny_llama(hidden_size=48))
    loaded = load_model(str(export_with_tokenizer(original, format_, tmp_path)), "float32")
    windows = tiny_windows(2, 24)
    assert torch.allclose(
        loaded.causal_lm(input_ids=windows).logits, original.causal_lm(input_ids=windows).logits, atol=1e-4
    )


def test_an_unknown_model_with_code_of_its_own_is_refused_by_its_type(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    change_config(save_tiny_folder(tmp_path), model_type="x", auto_map=auto_map)
    with pytest.raises(ModelError, match="models of type 'x' cannot be pruned"):
        load_model(str(tmp_path), "float32")


@pytest.mark.model
def test_smollm2_comes_from_its_package_without_a_hub() -> None:
    need_smollm2()
    model = load_model("smollm2", "bfloat16")
    assert len(model.decoder.shape.layers) == 30
    assert model.decoder.shape.total_parameters == 134_515_008
