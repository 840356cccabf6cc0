"""vLLM, played by a class in its place: what it is given, what its clock says, and what its failures leave."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from daemon.cli import main
from gpu_worker.speed import vllm_engine
from gpu_worker.speed.speed import measure_speed
from gpu_worker.speed.transformers_engine import TransformersRunner
from gpu_worker.speed.vllm_engine import MEMORY_SHARE, VllmRunner, memory_shares, needs_remote_code
from protocol.errors import ModelError
from tests.support.speed_folders import LENGTH, clock, request
from tests.support.tiny_models import tiny_llama


class _Llm:
    """In place of vLLM's class: makes as many tokens as it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []

    def generate(self, prompts: list[dict[str, list[int]]], params: dict[str, Any], *, use_tqdm: bool) -> Iterator[Any]:
        assert not use_tqdm and params["ignore_eos"] and params["temperature"] == 0.0
        self.asked.append((len(prompts), len(prompts[0]["prompt_token_ids"]), params["max_tokens"]))
        tokens = range(params["max_tokens"])
        return iter([type("O", (), {"outputs": [type("C", (), {"token_ids": tokens})()]})() for _ in prompts])


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
    monkeypatch.setattr(vllm_engine, "_read_sizes", lambda _: ((size, size), 320, str(folders / "dense")))
    monkeypatch.setattr(vllm_engine, "device_name", lambda _: "a GPU")
    return module


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("Engine core initialization failed.\nMore")])
def test_what_was_measured_is_kept_where_vllm_fails(
    folders: Path, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(vllm, "LLM", fails)
    for named in ((), ("transformers", "vllm")):
        result, _ = measure_speed(request(folders, engines=named))
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

    monkeypatch.setattr(vllm_engine, "_read_sizes", full)
    result, _ = measure_speed(request(folders, engines=("transformers", "vllm")))
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
    small = size.model_copy(update={"weight_bytes": 2000, "kv_cache_bytes_per_token": 10})
    sizes = (small.model_copy(update={"weight_bytes": 4000}), small)
    # Fourteen tokens take a block of sixteen.
    shares = memory_shares(sizes, 14, 2, free=10_000, whole=20_000)
    assert shares == pytest.approx(((4320 + 880) / 20_000, (2320 + 880) / 20_000))
    with pytest.raises(
        ModelError, match=r"vLLM needs about .* for both models .* use smaller batches \(--batch-size\)"
    ):
        memory_shares(sizes, 14, 9, free=10_000, whole=20_000)


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


@pytest.mark.parametrize("name", ["modeling_pruned_llama.py", "helpers.py", "custom_generate/generate.py"])
def test_vllm_is_given_no_code_that_is_not_ours(folders: Path, copied: Path, name: str) -> None:
    assert needs_remote_code(folders / "hf") and not needs_remote_code(folders / "dense")
    file = copied / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("import os\n")
    with pytest.raises(ModelError, match=f"{name}' differs from what this version of Self-Pruner writes"):
        needs_remote_code(copied)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_vllm_is_given_no_folder_that_names_other_code(copied: Path, name: str) -> None:
    file = copied / name
    given = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(given | {"auto_map": {"AutoModel": "some/repository--modeling.Model"}}))
    with pytest.raises(ModelError, match=f"{name}' differs from what this version of Self-Pruner writes"):
        needs_remote_code(copied)


def test_vllm_looks_into_no_folder_elsewhere(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (copied / "custom_generate").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="custom_generate' differs from what"):
        needs_remote_code(copied)


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
