"""Both engines on tiny models: what they run, how often, how long by a scripted clock, and how large they say it is."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import pytest
import torch

from daemon.cli import main
from gpu_worker.export.gguf import write_gguf
from gpu_worker.families import take_apart
from gpu_worker.memory import Workload
from gpu_worker.models import LoadedModel, bare_model, load_side_by_side
from gpu_worker.progress import no_progress
from gpu_worker.speed import comparing, transformers_engine, vllm_engine
from gpu_worker.speed.comparing import measure_speed
from gpu_worker.speed.engines import SpeedRequest
from gpu_worker.speed.measuring import Length
from gpu_worker.speed.sweep import widen
from gpu_worker.speed.transformers_engine import TransformersRunner, devices_of, open_pair
from gpu_worker.speed.vllm_engine import MEMORY_SHARE, VllmRunner, has_our_code, memory_shares
from protocol.errors import ModelError, SettingsError
from protocol.formats import Format
from tests.exports import export, pruned, with_tokenizer
from tests.pruned_models import keep
from tests.tiny_models import save_tiny_folder, tiny_llama, tiny_model

pytest.importorskip("xllamacpp")

from gpu_worker.speed import gguf_pair
from gpu_worker.speed.gguf_pair import GgufModel, gguf_files
from gpu_worker.speed.llama_cpp_engine import LlamaCppRunner, timing_of
from gpu_worker.speed.llama_cpp_engine import open_pair as open_in_llama_cpp

PLAN = keep((2, 1, 20), (3, 1, 48), (1, 2, 7))
LENGTH = Length(prompt=9, generate=4)
KV_HEADS = 2 + 3 + 1


def clock(*times: float) -> Any:
    return iter(times).__next__


class Seen:
    """What a model's body was given, call by call."""

    def __init__(self, model: LoadedModel) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.heads: list[tuple[int, ...]] = []
        model.decoder.body.register_forward_pre_hook(self._note, with_kwargs=True)
        model.decoder.head.register_forward_pre_hook(lambda _, given: self.heads.append(tuple(given[0].shape)))

    def _note(self, _: object, __: object, given: dict[str, Any]) -> None:
        self.shapes.append(tuple(given["input_ids"].shape))


def test_the_prompt_is_one_forward_with_one_row_of_logits_and_each_token_one_more() -> None:
    model = pruned(tiny_llama(), PLAN)
    seen = Seen(model)
    timing = TransformersRunner(model, LENGTH, clock=clock(1.0, 3.0, 8.0)).run(2)
    assert seen.shapes == [(2, 9)] + [(2, 1)] * 4
    assert seen.heads == [(2, 1, 36)] * 5
    assert (timing.prefill_tokens, timing.prefill_seconds) == (18, 2.0)
    assert (timing.decode_tokens, timing.decode_seconds) == (8, 5.0)


def test_the_clock_waits_for_every_gpu_that_the_model_lies_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (torch.device("cuda:1"), torch.device("cuda:3"))
    waited: list[torch.device] = []
    monkeypatch.setattr(transformers_engine, "devices_of", lambda _: gpus)
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    TransformersRunner(tiny_llama(), LENGTH).run(1)
    assert waited == [*gpus] * 3


def test_a_model_lies_on_all_devices_of_its_weights() -> None:
    model = tiny_llama()
    assert devices_of(model) == (torch.device("cpu"),)
    model.decoder.layers[1].module.to("meta")
    assert devices_of(model) == (torch.device("cpu"), torch.device("meta"))


def test_both_models_are_loaded_onto_one_placement_and_all_its_devices_are_named(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def load(names: tuple[str, ...], dtype: str, workload: Workload) -> Any:
        asked.append(names)
        assert workload.keeps_keys and workload.seqlen == LENGTH.total * 2
        return load_side_by_side(names, dtype, workload)

    monkeypatch.setattr(transformers_engine, "load_side_by_side", load)
    monkeypatch.setattr(transformers_engine, "devices_of", lambda _: (torch.device("cpu"), torch.device("meta")))
    with open_pair(request(folders)) as pair:
        assert pair.device == "cpu, meta"
    assert asked == [(str(folders / "dense"), str(folders / "hf"))]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "phi3"])
def test_tokens_with_the_cache_are_those_of_the_whole_text(family: str) -> None:
    """What is timed is the model at work, and not something else: every family, its layers pruned apart."""
    model = pruned(tiny_model(family), PLAN)
    runner = TransformersRunner(model, LENGTH)
    newest: list[int] = []
    model.decoder.body.register_forward_pre_hook(
        lambda _, __, given: newest.extend(given["input_ids"][0].tolist()), with_kwargs=True
    )
    runner.run(1)
    (ids,) = torch.tensor([newest])
    logits = model.causal_lm(input_ids=ids[None]).logits[0]
    assert logits[len(ids) - LENGTH.generate - 1 : -1].argmax(-1).tolist() == ids[-LENGTH.generate :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_real_tensors(dtype: torch.dtype) -> None:
    model = pruned(tiny_llama(dtype=dtype), PLAN)
    size_of = dtype.itemsize
    runner = TransformersRunner(tiny_with(model), LENGTH)
    runner.run(3)
    size = runner.size()
    assert size.kv_cache_bytes_per_token == 2 * size_of * 8 * KV_HEADS
    assert size.kv_cache_bytes == size.kv_cache_bytes_per_token * LENGTH.total
    weights = list(model.causal_lm.parameters())
    assert size.weight_bytes == sum(weight.numel() for weight in weights) * size_of
    assert size.weight_type == str(dtype).removeprefix("torch.")


def tiny_with(model: LoadedModel) -> LoadedModel:
    """The model taken apart again, as a folder is when it is loaded: its shape is that of what stayed."""
    return LoadedModel(model.causal_lm, model.tokenizer, take_apart(model.causal_lm), model.identity)


def test_a_window_holds_fewer_tokens_than_the_text() -> None:
    runner = TransformersRunner(tiny_model("gemma3_text"), LENGTH)
    runner.run(1)
    size = runner.size()
    # Two layers of three keep the last nine of thirteen tokens.
    assert size.kv_cache_bytes == size.kv_cache_bytes_per_token // 3 * (13 + 2 * 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, an hf export and a GGUF export of a pruned one."""
    folder = tmp_path_factory.mktemp("speed")
    save_tiny_folder(folder / "dense")
    model = pruned(with_tokenizer(tiny_llama()), PLAN)
    export(model, "hf", folder / "hf", PLAN)
    export(model, "gguf", folder / "gguf", PLAN)
    return folder


def request(folders: Path, name: str = "hf", **options: Any) -> SpeedRequest:
    given: dict[str, Any] = {
        "baseline": str(folders / "dense"),
        "length": LENGTH,
        "dtype": "float32",
        "repeats": 2,
        "batch_sizes": (1, 2),
    }
    return SpeedRequest(folder=folders / name, **(given | options))


def test_both_engines_measure_an_hf_folder(folders: Path) -> None:
    result = measure_speed(request(folders))
    assert [found.engine for found in result.engines] == ["transformers", "llama.cpp"]
    for found in result.engines:
        assert [batch.batch_size for batch in found.batches] == [1, 2]
        assert [batch.prefill.tokens for batch in found.batches] == [9, 18]
        assert [batch.decode.tokens for batch in found.batches] == [4, 8]
        assert found.dense.total_parameters - found.dense.decoder_parameters == 320 * 36 + 36
        assert found.pruned.decoder_parameters < found.dense.decoder_parameters
        assert found.threads == torch.get_num_threads()
    in_torch, in_llama = (found.pruned for found in result.engines)
    assert in_torch.decoder_parameters == in_llama.decoder_parameters
    assert in_torch.kv_cache_bytes_per_token == 2 * in_llama.kv_cache_bytes_per_token  # float32, F16
    assert result.skipped.keys() == {"vllm"}


def test_an_engine_that_nobody_named_and_that_cannot_run_the_family_is_skipped(tmp_path: Path) -> None:
    save_tiny_folder(tmp_path / "dense", "qwen3")
    export(pruned(with_tokenizer(tiny_model("qwen3")), PLAN), "hf", tmp_path / "hf", PLAN)
    result = measure_speed(request(tmp_path))
    assert [found.engine for found in result.engines] == ["transformers"]
    assert "gguf cannot carry a pruned model of the family 'qwen3'" in result.skipped["llama.cpp"]
    with pytest.raises(ModelError, match="gguf cannot carry"):
        measure_speed(request(tmp_path, engines=("llama.cpp", "transformers")))


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("Engine core initialization failed.\nMore")])
def test_what_was_measured_is_kept_where_vllm_fails(
    folders: Path, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(vllm, "LLM", fails)
    for named in ((), ("transformers", "vllm")):
        result = measure_speed(request(folders, engines=named))
        assert "transformers" in [found.engine for found in result.engines]
        assert re.fullmatch(
            r"vLLM cannot load '.*dense' \((x|RuntimeError: Engine .* failed)\)", result.skipped["vllm"]
        )
    with pytest.raises(ModelError, match="vLLM cannot load"):
        measure_speed(request(folders, engines=("vllm", "transformers")))


def test_an_engine_that_runs_out_of_memory_takes_nothing_along(
    folders: Path, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vllm_engine, "_look_at", full)
    result = measure_speed(request(folders, engines=("transformers", "vllm")))
    assert "does not fit into memory (CUDA out of memory)" in result.skipped["vllm"]


def test_vllm_failing_amid_a_measurement_is_one_sentence(folders: Path, vllm: ModuleType) -> None:
    class Dead:
        def generate(self, *_: object, **__: object) -> None:
            raise RuntimeError("EngineCore encountered an issue.")

    size = TransformersRunner(tiny_llama(), LENGTH).size()
    with pytest.raises(ModelError, match=r"vLLM cannot generate \(RuntimeError: EngineCore encountered an issue\)"):
        VllmRunner(Dead(), dict, LENGTH, size, 320).run(1)


def test_the_command_prints_what_was_measured_and_blames_the_named_engine_that_was_not(
    folders: Path, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (10, 10))
    command = ["speed", str(folders / "hf"), "--baseline", str(folders / "dense"), "--dtype", "float32", "--json"]
    sizes = ["--prompt", "9", "--generate", "4", "--repeats", "1"]
    assert main([*command, *sizes, "--engine", "transformers", "--engine", "vllm"]) == 2
    said = capsys.readouterr()
    assert [found["engine"] for found in json.loads(said.out)["engines"]] == ["transformers"]
    assert "vLLM needs about" in said.err.splitlines()[-1]


def test_each_model_gets_the_memory_that_it_needs_of_the_gpu_that_vllm_shares() -> None:
    size = TransformersRunner(tiny_llama(), LENGTH).size()
    sizes = [
        size.model_copy(update={"weight_bytes": weights, "kv_cache_bytes_per_token": 10}) for weights in (4000, 2000)
    ]
    # Fourteen tokens take a block of sixteen.
    shares = memory_shares((sizes[0], sizes[1]), 14, 2, free=10_000, whole=20_000)
    assert shares == pytest.approx(((4320 + 880) / 20_000, (2320 + 880) / 20_000))
    with pytest.raises(
        ModelError, match=r"vLLM needs about .* for both models .* use smaller batches \(--batch-size\)"
    ):
        memory_shares((sizes[0], sizes[1]), 14, 9, free=10_000, whole=20_000)


def test_a_sweep_changes_widths_and_leaves_heads(folders: Path) -> None:
    asked = request(folders, engines=("transformers",), multiples=(1, 16))
    result = measure_speed(asked)
    whole = tiny_llama().decoder.shape
    expected = [PLAN, keep((2, 1, 16), (3, 1, 48), (1, 2, 16))]
    assert [each.decoder_parameters for each in result.sweep] == [plan.decoder_parameters(whole) for plan in expected]
    with pytest.raises(SettingsError, match="needs an hf folder and the engine transformers"):
        measure_speed(request(folders, engines=("llama.cpp",), multiples=(8,)))


def test_a_sweep_computes_with_the_dense_models_channels(folders: Path) -> None:
    with open_pair(request(folders)) as pair:
        dense, kept = (runner.model.decoder.layers[0] for runner in (pair.dense, pair.pruned))  # type: ignore[attr-defined]
        widen(kept, dense, 48)
        hidden = torch.randn(1, 3, 36)
        assert torch.equal(kept.module.mlp(hidden), dense.module.mlp(hidden))
        widen(kept, dense, 5)
        assert [linear.weight.shape for linear in (kept.gate, kept.up, kept.down)] == [(5, 36), (5, 36), (36, 5)]
        assert all(linear.weight.is_contiguous() for linear in (kept.gate, kept.up, kept.down))
        assert kept.module.mlp(hidden).shape == hidden.shape


def test_widened_layers_stay_on_their_own_device() -> None:
    dense, kept = (tiny_model("llama", bias=True).decoder.layers[0] for _ in range(2))
    kept.module.to("meta")
    widen(kept, dense, 20)
    for linear in (kept.gate, kept.up, kept.down):
        assert linear.bias is not None
        assert (linear.weight.device.type, linear.bias.device.type) == ("meta", "meta")


def test_a_gguf_folder_runs_in_llama_cpp_with_a_dense_file_of_its_type(folders: Path) -> None:
    result = measure_speed(request(folders, "gguf"))
    (found,) = result.engines
    assert (found.engine, found.dense.weight_type, found.pruned.weight_type) == ("llama.cpp", "f16", "f16")
    file = next((folders / "gguf").glob("*.gguf"))
    assert found.pruned.disk_bytes == file.stat().st_size
    tensors = gguf.GGUFReader(file).tensors
    assert found.pruned.weight_bytes == sum(int(tensor.n_bytes) for tensor in tensors)
    assert found.pruned.kv_cache_bytes == 2 * 2 * 8 * KV_HEADS * LENGTH.total
    assert result.skipped.keys() == {"transformers", "vllm"}


def test_a_dense_gguf_file_is_used_as_it_is_and_gives_its_type_to_the_other(folders: Path, tmp_path: Path) -> None:
    model = with_tokenizer(tiny_llama())
    whole = keep(*[(3, 2, 48)] * 3)
    dense = write_gguf(model, whole, tmp_path, file_type="q8_0", name="dense")
    (tmp_path / "made").mkdir()
    asked = request(folders, baseline=str(dense))
    found = gguf_files(asked, ("hf",), tmp_path / "made", no_progress)
    assert found[0].path == dense
    assert [each.weight_type for each in found] == ["q8_0", "q8_0"]
    with open_in_llama_cpp(asked, ("hf",), no_progress) as pair:
        assert pair.pruned.run(2).decode_tokens == 8


@pytest.fixture(scope="module")
def with_gguf(folders: Path) -> Path:
    """An hf export with a GGUF file of the type f16 beside it."""
    folder = Path(shutil.copytree(folders / "hf", folders / "hf-and-gguf"))
    mark = folder / "selfpruner.json"
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"formats": ["hf", "gguf"]}))
    shutil.copy(next((folders / "gguf").glob("*.gguf")), folder)
    return folder


def test_a_gguf_type_that_the_folders_file_does_not_have_is_made_of_the_hf_files_beside_it(
    folders: Path, with_gguf: Path, tmp_path: Path
) -> None:
    for asked, is_made in ((None, False), ("f16", False), ("q8_0", True)):
        made = tmp_path / str(asked)
        made.mkdir()
        found = gguf_files(request(folders, with_gguf.name, gguf_type=asked), ("hf", "gguf"), made, no_progress)
        assert [each.weight_type for each in found] == [asked or "f16"] * 2
        assert found[1].path.parent == (made / "pruned" if is_made else with_gguf)


def test_a_gguf_type_that_a_file_does_not_have_is_one_sentence_before_anything_is_measured(
    folders: Path, with_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "_measure_in", None)
    file = next((folders / "gguf").glob("*.gguf"))
    for folder, baseline in ((folders / "gguf", folders / "dense"), (with_gguf, file), (folders / "hf", file)):
        assert main(["speed", str(folder), "--baseline", str(baseline), "--gguf-type", "q8_0"]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"--gguf-type q8_0 is not the type of {str(file)!r}, which is f16; leave it out" in said


def test_a_type_that_cannot_be_made_is_one_sentence(folders: Path, tmp_path: Path) -> None:
    found = GgufModel.of(next((folders / "gguf").glob("*.gguf")))
    assert found.exported_type == "f16"
    dense = write_gguf(with_tokenizer(tiny_llama()), keep(*[(3, 2, 48)] * 3), tmp_path, file_type="f16", name="dense")
    reader = gguf.GGUFReader(dense, "r+")
    reader.fields["general.file_type"].parts[-1][0] = gguf.LlamaFileType.MOSTLY_IQ2_XS
    reader.data.flush()
    with pytest.raises(ModelError, match="cannot be made in the type iq2_xs"):
        gguf_files(request(folders, baseline=str(dense)), ("hf",), tmp_path, no_progress)


def test_no_room_for_the_files_is_one_sentence(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be written into .* \(No such file or directory\); set TMPDIR"):
        gguf_files(request(folders), ("hf",), tmp_path / "nowhere", no_progress)


def test_room_for_both_files_is_asked_for_before_the_first_is_written(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_pair, "load_model", None)
    both: dict[Format, tuple[str, ...]] = {"hf": ("dense", "hf"), "gguf": ("dense",)}
    for name, parts in both.items():
        shapes = [bare_model(str(folders / part), "float32").decoder.shape for part in parts]
        needed = sum(shape.total_parameters for shape in shapes) * 2
        disk = SimpleNamespace(free=needed - 1)
        monkeypatch.setattr("shutil.disk_usage", lambda _, disk=disk: disk)
        with pytest.raises(ModelError, match=r"making GGUF files .* needs about .* of disk where .*; set TMPDIR"):
            gguf_files(request(folders, name), (name,), tmp_path, no_progress)
        disk.free = needed
        with pytest.raises(TypeError, match="not callable"):
            gguf_files(request(folders, name), (name,), tmp_path, no_progress)


def test_a_broken_gguf_file_is_one_sentence(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is no GGUF file"):
        GgufModel.of(tmp_path / "x.gguf")


def answered(**changes: int) -> dict[str, Any]:
    return {"timings": {"prompt_n": 9, "prompt_ms": 20.0, "predicted_n": 5, "predicted_ms": 8.0} | changes}


def test_what_llama_cpp_says_of_a_batch_is_its_slowest_text() -> None:
    timing = timing_of([answered(), answered(prompt_ms=30, predicted_ms=6)], LENGTH)
    assert (timing.prefill_tokens, timing.prefill_seconds) == (18, 0.03)
    assert (timing.decode_tokens, timing.decode_seconds) == (8, 0.008)


def test_llama_cpps_clock_of_the_decode_starts_with_the_first_token(folders: Path) -> None:
    """One token takes no time, so that a rate over all of them would be too high."""
    with open_in_llama_cpp(request(folders, "gguf"), ("gguf",), no_progress) as pair:
        assert isinstance(pair.pruned, LlamaCppRunner)
        (answer,) = pair.pruned.post("/completion", {"prompt": [1, 2, 3], "n_predict": 1, "cache_prompt": False})
    assert answer["timings"]["predicted_n"] == 1
    assert answer["timings"]["predicted_ms"] < 0.01 < answer["timings"]["prompt_ms"]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (answered(prompt_n=1), "processed 1 and generated 5 tokens where 9 and 5"),
        (answered(predicted_n=2), "processed 9 and generated 2 tokens where 9 and 5"),
        ({"error": {"message": "too long"}}, "did not measure: {'message': 'too long'}"),
    ],
)
def test_a_prompt_out_of_a_cache_or_a_text_cut_short_is_no_measurement(answer: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        timing_of([answered(), answer], LENGTH)


class _Llm:
    """In place of vLLM's class: makes as many tokens as it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def generate(self, prompts: list[dict[str, list[int]]], params: dict[str, Any], *, use_tqdm: bool) -> Iterator[Any]:
        assert not use_tqdm and params["ignore_eos"] and params["temperature"] == 0.0
        self.asked.append((len(prompts), len(prompts[0]["prompt_token_ids"]), params["max_tokens"]))
        tokens = range(params["max_tokens"])
        return iter([type("O", (), {"outputs": [type("C", (), {"token_ids": tokens})()]})() for _ in prompts])


def test_vllms_decode_is_what_all_tokens_take_longer_than_the_first() -> None:
    llm = _Llm()
    size = TransformersRunner(tiny_llama(), LENGTH).size()
    runner = VllmRunner(llm, dict, LENGTH, size, 320, clock=clock(0.0, 2.0, 10.0, 15.0))
    timing = runner.run(3)
    assert llm.asked == [(3, 9, 1), (3, 9, 5)]
    assert (timing.prefill_tokens, timing.prefill_seconds) == (27, 2.0)
    assert (timing.decode_tokens, timing.decode_seconds) == (12, 3.0)


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Path:
    """An hf export that may be changed."""
    return Path(shutil.copytree(folders / "hf", tmp_path / "copy"))


def test_vllm_runs_our_code_of_our_folders_and_no_other(folders: Path) -> None:
    assert has_our_code(folders / "hf")
    assert not has_our_code(folders / "dense")


@pytest.mark.parametrize("name", ["modeling_pruned_llama.py", "helpers.py", "custom_generate/generate.py"])
def test_vllm_is_given_no_code_that_is_not_ours(copied: Path, name: str) -> None:
    file = copied / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("import os\n")
    with pytest.raises(ModelError, match=f"{name}' is not what this version of Self-Pruner writes"):
        has_our_code(copied)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_vllm_is_given_no_folder_that_names_other_code(copied: Path, name: str) -> None:
    file = copied / name
    given = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(given | {"auto_map": {"AutoModel": "some/repository--modeling.Model"}}))
    with pytest.raises(ModelError, match=f"{name}' is not what this version of Self-Pruner writes"):
        has_our_code(copied)


def test_vllm_looks_into_no_folder_elsewhere(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (copied / "custom_generate").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="custom_generate' is not what"):
        has_our_code(copied)


@pytest.fixture
def vllm(folders: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """In place of the package vllm, on a machine that says it has a GPU. Its LLM does not say what it is given."""

    class Llm(_Llm):
        def __init__(self, **_: object) -> None:
            super().__init__()

    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = Llm, dict  # type: ignore[attr-defined]
    size = TransformersRunner(tiny_llama(), LENGTH).size()
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "to be left as it was afterwards")
    monkeypatch.delenv("VLLM_LOGGING_STREAM")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (10**9, 2 * 10**9))
    monkeypatch.setattr(vllm_engine, "_look_at", lambda _: ((size, size), 320, str(folders / "dense")))
    monkeypatch.setattr(vllm_engine, "device_name", lambda _: "a GPU")
    return module


def test_vllm_is_told_to_trust_the_folder_and_not_the_baseline(
    folders: Path, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted: dict[str, bool] = {}
    shares: list[float] = []

    def llm(*, model: str, trust_remote_code: bool, gpu_memory_utilization: float, **_: object) -> None:
        trusted[Path(model).name] = trust_remote_code
        shares.append(gpu_memory_utilization)

    monkeypatch.setattr(vllm, "LLM", llm)
    with vllm_engine.open_pair(request(folders)):
        assert trusted == {"dense": False, "hf": True}
    assert sum(shares) == pytest.approx(MEMORY_SHARE / 2), "half of the GPU is free"


def test_what_vllm_prints_is_not_in_the_answer(
    folders: Path, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Talkative(vllm.LLM):  # type: ignore[misc, name-defined]
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"
            sys.stdout.write("loaded\n")

        def generate(self, *given: Any, **options: Any) -> Any:
            sys.stdout.write("by Python\n")
            os.write(1, b"by the system\n")
            subprocess.run(["echo", "by a process"], check=True)
            return super().generate(*given, **options)

    monkeypatch.setattr(vllm, "LLM", Talkative)
    # As it is where nothing captures it: what is printed waits, and goes to the descriptor.
    with open(1, "w", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with vllm_engine.open_pair(request(folders)) as pair:
            assert pair.dense.run(2).decode_tokens == 8
        sys.stdout.write("the answer\n")
    said = capfd.readouterr()
    assert said.out == "the answer\n"
    for words in ("loaded", "by Python", "by the system", "by a process"):
        assert words in said.err
