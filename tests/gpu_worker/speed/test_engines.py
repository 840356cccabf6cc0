"""Both engines on tiny models: what they run, how often, how long by a scripted clock, and how large they say it is."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from structlog.testing import capture_logs

from daemon.cli import main
from gpu_worker.llama_cpp.writer import write_gguf
from gpu_worker.models.families import extract_decoder
from gpu_worker.models.loading import LoadedModel, load_side_by_side, load_without_weights
from gpu_worker.models.memory import Workload
from gpu_worker.progress import no_progress
from gpu_worker.speed import speed as comparing
from gpu_worker.speed import transformers_engine
from gpu_worker.speed.speed import measure_speed
from gpu_worker.speed.transformers_engine import TransformersRunner, devices_of, open_pair
from protocol.errors import ModelError
from protocol.results.formats import Format
from tests.support.exports import export, pruned, with_tokenizer
from tests.support.pruned_models import keep
from tests.support.speed_folders import LENGTH, PLAN, clock, request
from tests.support.tiny_models import save_tiny_folder, tiny_llama, tiny_model

pytest.importorskip("xllamacpp")

from gpu_worker.speed import gguf_pair
from gpu_worker.speed.gguf_pair import GgufModel, gguf_files
from gpu_worker.speed.llama_cpp_engine import LlamaCppRunner, timing_of
from gpu_worker.speed.llama_cpp_engine import open_pair as open_in_llama_cpp

KV_HEADS = 2 + 3 + 1


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
        assert workload.keeps_kv_cache and workload.seqlen == LENGTH.total * 2
        return load_side_by_side(names, dtype, workload)

    monkeypatch.setattr(transformers_engine, "load_side_by_side", load)
    monkeypatch.setattr(transformers_engine, "devices_of", lambda _: (torch.device("cpu"), torch.device("meta")))
    with open_pair(request(folders)) as pair:
        assert pair.device == "cpu, meta"
    assert asked == [(str(folders / "dense"), str(folders / "hf"))]


@pytest.mark.parametrize(("dtype", "warnings"), [("bfloat16", 1), ("float32", 0)])
def test_a_type_that_the_cpu_has_no_instructions_for_is_warned_about(
    folders: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, warnings: int
) -> None:
    monkeypatch.setattr("gpu_worker.measuring.half_precision.is_slow", lambda dtype: dtype == torch.bfloat16)
    with capture_logs() as logs, open_pair(request(folders, dtype=dtype)):
        assert [line["event"] for line in logs].count("half_precision_is_slow") == warnings


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
    return LoadedModel(model.causal_lm, model.tokenizer, extract_decoder(model.causal_lm), model.identity)


def test_a_window_holds_fewer_tokens_than_the_text() -> None:
    runner = TransformersRunner(tiny_model("gemma3_text"), LENGTH)
    runner.run(1)
    size = runner.size()
    # Two layers of three keep the last nine of thirteen tokens.
    assert size.kv_cache_bytes == size.kv_cache_bytes_per_token // 3 * (13 + 2 * 9)


def test_both_engines_measure_an_hf_folder(folders: Path) -> None:
    result, _ = measure_speed(request(folders))
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
    result, _ = measure_speed(request(tmp_path))
    assert [found.engine for found in result.engines] == ["transformers"]
    assert "gguf does not support pruned models of the family 'qwen3'" in result.skipped["llama.cpp"]
    with pytest.raises(ModelError, match="gguf does not support"):
        measure_speed(request(tmp_path, engines=("llama.cpp", "transformers")))


def test_a_gguf_folder_runs_in_llama_cpp_with_a_dense_file_of_its_type(folders: Path) -> None:
    result, _ = measure_speed(request(folders, "gguf"))
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
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        GgufModel.of(tmp_path / "x.gguf")
    assert GgufModel.of(next((folders / "gguf").glob("*.gguf"))).exported_type == "f16"
    dense = write_gguf(with_tokenizer(tiny_llama()), keep(*[(3, 2, 48)] * 3), tmp_path, file_type="f16", name="dense")
    reader = gguf.GGUFReader(dense, "r+")
    reader.fields["general.file_type"].parts[-1][0] = gguf.LlamaFileType.MOSTLY_IQ2_XS
    reader.data.flush()
    with pytest.raises(ModelError, match="cannot be converted to the type iq2_xs"):
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
        shapes = [load_without_weights(str(folders / part), "float32").decoder.shape for part in parts]
        needed = sum(shape.total_parameters for shape in shapes) * 2
        disk = SimpleNamespace(free=needed - 1)
        monkeypatch.setattr("shutil.disk_usage", lambda _, disk=disk: disk)
        with pytest.raises(ModelError, match=r"making GGUF files .* needs about .* of disk where .*; set TMPDIR"):
            gguf_files(request(folders, name), (name,), tmp_path, no_progress)
        disk.free = needed
        with pytest.raises(TypeError, match="not callable"):
            gguf_files(request(folders, name), (name,), tmp_path, no_progress)


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
