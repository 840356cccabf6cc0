import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import PreTrainedTokenizerFast as Tokenizer

from gpu_worker.measuring import corpora
from gpu_worker.measuring.corpora import GenerateText, Texts, load_roles
from protocol.errors import DataError
from protocol.plans.spec import SearchSpec, TextSpec
from tests.support.tiny_models import save_tiny_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a byte."""
    folder = save_tiny_folder(tmp_path_factory.mktemp("corpora"), hidden_size=48)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A thousand bytes in which every ten say where they stand."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i:09d}\n" for i in range(100)))
    return str(path)


def spec_of(calibration: TextSpec, fitness: TextSpec, report: TextSpec | None = None, seed: int = 0) -> SearchSpec:
    return SearchSpec(model="smollm2", rate=0.3, calibration=calibration, fitness=fitness, report=report, seed=seed)


def no_generation(windows: int, length: int) -> Tensor:
    raise AssertionError("no role asks for text that the model writes")


def part(source: str, windows: int | None, seqlen: int = 10) -> TextSpec:
    return TextSpec(source=source, windows=windows, seqlen=seqlen)


Load = Callable[..., Texts]


def texts_of(spec: SearchSpec, tokenizer: Tokenizer, generate: GenerateText, start: int | None = None) -> Texts:
    return Texts.of(load_roles(spec.texts, spec.seed, tokenizer, generate, start))


@pytest.fixture
def load(tokenizer: Tokenizer) -> Load:
    def load(*parts: TextSpec | None, seed: int = 0) -> Texts:
        return texts_of(spec_of(*parts, seed=seed), tokenizer, no_generation)  # type: ignore[arg-type,misc]

    return load


def rows(windows: Tensor | None) -> list[tuple[int, ...]]:
    assert windows is not None
    return [tuple(row) for row in windows.tolist()]


def test_roles_with_one_source_get_different_windows(load: Load, text: str) -> None:
    texts = load(part(text, 40), part(text, 30), part(text, 30))
    dealt = rows(texts.calibration) + rows(texts.fitness) + rows(texts.report)
    assert len(dealt) == len(set(dealt)) == 100


def test_all_windows_of_a_text_that_no_other_role_uses_come_in_order(
    load: Load, text: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text " * 20)
    texts = load(part(str(other), 2), part(text, None, seqlen=16))
    expected = tokenizer(Path(text).read_text())["input_ids"][: 62 * 16]
    assert texts.fitness.shape == (62, 16)
    assert texts.fitness.flatten().tolist() == expected


def test_all_windows_leaves_out_those_that_other_roles_took(load: Load, text: str) -> None:
    texts = load(part(text, 40), part(text, None))
    calibration, fitness = rows(texts.calibration), rows(texts.fitness)
    assert len(fitness) == 60
    assert not set(calibration) & set(fitness)
    assert fitness == sorted(fitness)


def test_roles_of_different_lengths_share_no_token(load: Load, text: str) -> None:
    texts = load(part(text, 15, seqlen=10), part(text, 10, seqlen=30))
    inside = {window[i : i + 10] for window in rows(texts.fitness) for i in (0, 10, 20)}
    assert texts.calibration.shape == (15, 10)
    assert texts.fitness.shape == (10, 30)
    assert not inside & set(rows(texts.calibration))


def test_the_seed_decides_which_windows_and_the_digest_tells(load: Load, text: str) -> None:
    parts = (part(text, 5), part(text, 5))
    first, again, other = load(*parts), load(*parts), load(*parts, seed=1)
    assert first.digest == again.digest != other.digest
    assert rows(first.calibration) == rows(again.calibration) != rows(other.calibration)


def test_the_digest_tells_whose_windows_they_are() -> None:
    one, two = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    assert Texts(one, two, None).digest != Texts(two, one, None).digest


def test_a_text_that_is_too_short_is_refused_with_the_numbers(load: Load, text: str) -> None:
    with pytest.raises(DataError, match=r"100 windows of 10.*calibration: 90 windows of 10, fitness: 11 windows of 10"):
        load(part(text, 90), part(text, 11))


def test_two_roles_cannot_both_have_all_windows(load: Load, text: str) -> None:
    with pytest.raises(DataError, match="too short"):
        load(part(text, None), part(text, None))


@pytest.mark.parametrize(("content", "sentence"), [(None, "cannot be read"), (b"\xff\xfe\x00", "not UTF-8")])
def test_what_is_no_text_is_refused(load: Load, tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "text"
    if content:
        path.write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load(part(str(path), 1), part(str(path), 1))


def test_rare_words_of_wikitext_are_read_as_a_word(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("<unk>" * 20)
    other = tmp_path / "other.txt"
    other.write_text("unk" * 20)
    marked = load(part(str(path), None, seqlen=30), part(str(other), 1))
    plain = load(part(str(other), None, seqlen=30), part(str(path), 1))
    assert rows(marked.calibration) == rows(plain.calibration)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_a_text_of_the_hub_without_a_hub_is_refused_with_what_to_pass_instead(load: Load, text: str, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is not on this machine.*; pass a text file, or `self`"):
        load(part(name, 1), part(text, 1))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError("Not enough disk space. Needed: 3 GB"), "Not enough disk space. Needed: 3 GB"),
        (
            caused(DatasetGenerationError("An error occurred"), OSError(28, "No space left on device")),
            "[Errno 28] No space left on device",
        ),
        (DatasetGenerationError("An error occurred"), "DatasetGenerationError: An error occurred"),
    ],
)
def test_of_a_text_of_the_hub_the_true_reason_is_told(
    load: Load, text: str, monkeypatch: pytest.MonkeyPatch, error: Exception, says: str, reachable: bool
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(corpora, "hub_reachable", lambda: reachable)
    monkeypatch.setattr(corpora, "set_datasets_offline", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError) as refusal:
        load(part("c4", 1), part(text, 1))
    assert str(refusal.value) == f"c4 cannot be loaded ({says}); pass a text file, or `self`"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What is asked of a hub that has, of each split, two documents that say which."""
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, data_files: object) -> dict[str, list[str]]:
        asked.append((name, config, split, data_files))
        return {"text": [f"{split} " * 9] * 2}

    monkeypatch.setattr(corpora, "hub_reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_each_role_has_a_split_of_wikitext(load: Load, hub: list[tuple[object, ...]], tokenizer: Tokenizer) -> None:
    texts = load(part("wikitext2", 3), part("wikitext2", None), part("wikitext2", None))
    assert hub == [("Salesforce/wikitext", "wikitext-2-raw-v1", s, None) for s in ("train", "validation", "test")]
    assert "train" in tokenizer.decode(texts.calibration.flatten())
    expected = "\n\n".join(["validation " * 9] * 2)
    assert texts.fitness.flatten().tolist() == tokenizer(expected)["input_ids"][: texts.fitness.numel()]


def test_each_role_has_documents_of_c4_that_no_other_has(load: Load, hub: list[tuple[object, ...]]) -> None:
    load(part("c4", 3), part("c4", 3), part("c4", None))
    assert all(asked[:2] == ("allenai/c4", None) for asked in hub)
    train, validation = "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"
    assert [asked[2:] for asked in hub] == [
        ("train[:4000]", {"train": train}),
        ("validation[1100:2200]", {"validation": validation}),
        ("validation[:1100]", {"validation": validation}),
    ]


def test_a_split_of_no_wanted_role_is_not_read(hub: list[tuple[object, ...]], tokenizer: Tokenizer) -> None:
    parts = {"calibration": part("wikitext2", 3), "fitness": part("wikitext2", None)}
    windows = load_roles(parts, 0, tokenizer, no_generation, only={"fitness"})  # type: ignore[arg-type]
    assert list(windows) == ["fitness"] and [asked[2] for asked in hub] == ["validation"]


def test_the_model_writes_as_much_as_all_roles_need_and_once(tokenizer: Tokenizer) -> None:
    asked: list[tuple[int, int]] = []

    def generate(windows: int, length: int) -> Tensor:
        asked.append((windows, length))
        return torch.arange(windows * length).view(windows, length)

    texts = texts_of(spec_of(part("self", 6, seqlen=8), part("self", 3, seqlen=16)), tokenizer, generate)
    assert asked == [(3 + 3, 16)]
    assert len(set(texts.calibration.flatten().tolist()) | set(texts.fitness.flatten().tolist())) == 6 * 8 + 3 * 16


def test_every_window_begins_with_the_token_that_a_model_needs(tokenizer: Tokenizer, text: str) -> None:
    spec = spec_of(part(text, 2, seqlen=16), part(text, None, seqlen=8))
    plain, started = (texts_of(spec, tokenizer, no_generation, start) for start in (None, 319))
    for before, after in ((plain.calibration, started.calibration), (plain.fitness, started.fitness)):
        assert (after[:, 0] == 319).all() and torch.equal(after[:, 1:], before[:, 1:])


def test_all_of_what_the_model_writes_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="is unlimited"):
        texts_of(spec_of(part("self", 4), part("self", None)), tokenizer, no_generation)


def test_a_text_longer_than_the_model_reads_brings_no_warning(
    tokenizer: Tokenizer, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.model_max_length = 16
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        texts_of(spec_of(part(text, 2), part(text, 2)), tokenizer, no_generation)
    finally:
        logger.removeHandler(caplog.handler)
        tokenizer.model_max_length = math.inf
    assert caplog.records == []
