from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gpu_worker.models.gguf_files as module
from gpu_worker.models.gguf_files import GgufHeader, unpacked
from gpu_worker.models.loading import LoadedModel, load_model
from protocol.errors import ModelError
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_models import tiny_llama, tiny_windows

pytestmark = pytest.mark.usefixtures("own_cache")
LLAMA3_THETA = 500000.0


def tiny(seed: int = 0) -> LoadedModel:
    return tiny_llama(hidden_size=48, seed=seed)


def llama3_factors(factor: float) -> list[float]:
    """What Llama 3.1 divides each of four frequencies by: short waves by nothing, long ones by the whole factor."""
    factors = []
    for i in range(4):
        wave = 2 * torch.pi * LLAMA3_THETA ** (i / 4)
        smooth = (8192 / wave - 1) / (4 - 1)
        factors.append(1 / ((1 - smooth) / factor + smooth) if 0 < smooth < 1 else (1.0 if smooth >= 1 else factor))
    return factors


def test_a_gguf_file_is_the_model_it_was_written_from(tmp_path: Path) -> None:
    original = tiny()
    loaded = load_model(str(write_tiny_gguf(tmp_path / "tiny.gguf", original)), "float32")
    tokens = tiny_windows(2, 24)
    expected = original.causal_lm(input_ids=tokens).logits
    assert torch.allclose(loaded.causal_lm(input_ids=tokens).logits, expected, atol=1e-4)
    assert loaded.decoder.shape == original.decoder.shape
    assert loaded.tokenizer.decode(loaded.tokenizer("Wörter\n")["input_ids"], skip_special_tokens=True) == "Wörter\n"


def test_a_file_is_unpacked_once_for_each_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", tiny())
    first = unpacked(file, "float32")
    assert unpacked(file, "bfloat16") != first
    copy = file.rename(tmp_path / "same content, other name.gguf")

    def nothing_is_read(_: Path) -> GgufHeader:
        raise AssertionError("it was unpacked again")

    monkeypatch.setattr(GgufHeader, "of", nothing_is_read)
    assert unpacked(copy, "float32") == first
    monkeypatch.undo()


def test_another_model_under_the_same_name_is_unpacked_anew(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    first = load_model(str(write_tiny_gguf(file, tiny(seed=0))), "float32")
    second = load_model(str(write_tiny_gguf(file, tiny(seed=1))), "float32")
    assert first.identity != second.identity
    assert not torch.equal(first.decoder.head.weight, second.decoder.head.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_unpacked_is_an_ordinary_checkpoint_of_that_type(tmp_path: Path, dtype: str) -> None:
    folder = unpacked(write_tiny_gguf(tmp_path / "tiny.gguf", tiny()), dtype)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in plain.parameters()} == {getattr(torch, dtype)}
    assert getattr(plain.config, "quantization_config", None) is None


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rotary_factors_of_llama_3_1_are_kept(tmp_path: Path, factor: float) -> None:
    factors = llama3_factors(factor)
    assert factors[0] == 1.0 < factors[2] < factors[3] == factor
    file = write_tiny_gguf(tmp_path / "tiny.gguf", tiny(), rope_theta=LLAMA3_THETA, rope_factors=factors)
    loaded = load_model(str(file), "float32").causal_lm
    plain = LLAMA3_THETA ** -(torch.arange(4) / 4)
    assert torch.allclose(plain / loaded.model.rotary_emb.inv_freq, torch.tensor(factors), rtol=1e-4)
    assert loaded.config.rope_parameters["factor"] == factor


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ({"rope_factors": [1.0, 2.0, 3.0, 8.0]}, "has unknown rope scaling factors; pass the model's folder"),
        ({"rope_scaling": "yarn"}, r"uses rope scaling \(yarn\), which transformers does not read"),
        ({"architecture": "deci"}, r"a pruned export for llama\.cpp.*pass the hf or the padded export"),
        ({"without": "blk.1.ffn_up"}, r"1 are missing.*'model\.layers\.1\.mlp\.up_proj\.weight'"),
    ],
    ids=["factors", "scaling", "pruned", "missing"],
)
def test_a_file_that_would_be_another_model_is_refused(tmp_path: Path, written: dict[str, Any], sentence: str) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", tiny(), **written)
    with pytest.raises(ModelError, match=sentence):
        load_model(str(file), "float32")


@pytest.mark.parametrize("architecture", ["command-r", "falcon"])
def test_an_architecture_that_cannot_be_read_or_pruned_is_named(tmp_path: Path, architecture: str) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", tiny(), architecture=architecture)
    with pytest.raises(ModelError, match=architecture):
        load_model(str(file), "float32")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_file_that_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_text("not a model, but long enough to hold a header")
    with pytest.raises(ModelError, match=r"text\.gguf' cannot be unpacked \(GGUF magic invalid\)"):
        load_model(str(file), "float32")


def test_a_file_that_would_not_fit_into_memory_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", tiny())
    monkeypatch.setattr(module, "main_memory", lambda: 100_000)
    with pytest.raises(ModelError, match=r"needs about 0\.2 MB of main memory where 0\.1 MB are available"):
        unpacked(file, "float32")
