"""A GGUF file is measured in llama.cpp as it is exported, and one that computes something else is not kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_worker.export.writer import ExportContent, export_model
from gpu_worker.llama_cpp import check as measuring
from gpu_worker.llama_cpp import writer
from gpu_worker.llama_cpp.tensors import GgufTensor, tensors_of
from gpu_worker.measuring.perplexity import perplexity
from gpu_worker.models.limits import LOGITS_CHUNK_BYTES
from protocol.errors import ModelError
from protocol.results.commands import GgufPerplexity
from protocol.results.formats import Destination, GgufType
from tests.support.exports import facts_of, pruned, with_tokenizer
from tests.support.tiny_models import tiny_model, tiny_windows

pytest.importorskip("xllamacpp")


def exported(out: Path, gguf_type: GgufType = "f16") -> GgufPerplexity | None:
    model = pruned(with_tokenizer(tiny_model("llama")))
    facts, windows = facts_of(model), tiny_windows(3, 64)
    return export_model(ExportContent(model, facts, windows), Destination(out, ("gguf",), gguf_type))


@pytest.mark.parametrize(("gguf_type", "within"), [("f16", 1e-3), ("q8_0", 0.05)])
def test_its_perplexity_stands_in_the_card_beside_that_in_memory(
    gguf_type: GgufType, within: float, tmp_path: Path
) -> None:
    found = exported(tmp_path / "small", gguf_type)
    model = pruned(with_tokenizer(tiny_model("llama")))
    assert found is not None
    assert (found.in_memory, found.tokens) == perplexity(model.decoder, tiny_windows(3, 64))
    assert found.perplexity == pytest.approx(found.in_memory, rel=within) and found.perplexity != found.in_memory
    assert json.loads((tmp_path / "small/selfpruner.json").read_text())["gguf"] == found.model_dump()
    card = (tmp_path / "small/README.md").read_text()
    assert f"the GGUF file ({gguf_type}) has a perplexity of {found.perplexity:.6g} on the first 189 of" in card


def test_no_more_windows_are_measured_than_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TOKENS", 130)
    found = exported(tmp_path / "small")
    assert found is not None and found.tokens == 2 * 63
    monkeypatch.setattr(measuring, "TOKENS", 10)
    found = exported(tmp_path / "one")
    assert found is not None and found.tokens == 63


def test_a_file_with_wrong_tensors_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(*arguments: Any) -> Any:
        tensors = {tensor.name: tensor for tensor in tensors_of(*arguments)}
        norm = tensors["output_norm.weight"]
        monkeypatch.setattr(type(norm), "data", lambda tensor: data(tensor) * (50 if tensor.name == norm.name else 1))
        return tuple(tensors.values())

    data = GgufTensor.data
    monkeypatch.setattr(writer, "tensors_of", swapped)
    with pytest.raises(ModelError, match=r"small-F16\.gguf is broken: in llama\.cpp it has a perplexity of"):
        exported(tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_it_is_not_measured_without_llama_cpp_or_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "find_spec", lambda _: None)
        assert exported(tmp_path / "a") is None
    monkeypatch.setattr(measuring, "main_memory", lambda: 1000)
    assert exported(tmp_path / "b") is None
    assert "GGUF file (" not in (tmp_path / "b/README.md").read_text()


def test_logits_made_some_rows_at_a_time_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_worker.llama_cpp import client as llama_cpp

    hidden, head = torch.randn(20, 8), torch.randn(50, 8)
    window = torch.randint(50, (20,))
    whole = llama_cpp._loss(hidden, head, window)
    monkeypatch.setitem(LOGITS_CHUNK_BYTES, "cpu", 3 * 4 * 50)
    assert llama_cpp._loss(hidden, head, window) == pytest.approx(whole)
