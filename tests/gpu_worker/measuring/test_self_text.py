import dataclasses

import pytest
import torch

from gpu_worker.measuring import self_text as module
from gpu_worker.measuring.self_text import sample, self_text
from gpu_worker.measuring.smollm2_text import written_beforehand
from gpu_worker.models.loading import LoadedModel, load_model
from gpu_worker.progress import no_progress
from tests.support.real_model import need_smollm2
from tests.support.tiny_models import save_tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_folder(tmp_path_factory.mktemp("self-text"), hidden_size=48)
    return load_model(str(folder), "float32")


def test_every_window_has_its_whole_length(model: LoadedModel) -> None:
    seen: list[tuple[int, int]] = []
    written = sample(model, 5, 24, 0, lambda stage, done, total: seen.append((done, total)))
    assert (written.shape, written.dtype) == ((5, 24), torch.long)
    assert seen[-1][0] == seen[-1][1]


def test_the_seed_decides_the_text(model: LoadedModel) -> None:
    first, again, other = (sample(model, 3, 24, seed, no_progress) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_windows_differ_even_where_their_openings_are_the_same(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written in batches."""
    monkeypatch.setattr("gpu_worker.models.memory.MAX_GENERATION_BATCH", 2)
    windows = len(module.OPENINGS) + 1
    written = sample(model, windows, 24, 0, no_progress)
    assert len(written) == windows and not torch.equal(written[0], written[-1])


def test_every_token_follows_from_all_tokens_before_it(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOP_K", 1)
    written = sample(model, 3, 24, 0, no_progress)
    with torch.no_grad():
        logits = model.causal_lm(input_ids=written).logits
    logits[:, :, model.tokenizer.all_special_ids] = -torch.inf
    beginning = module._prompts(model.tokenizer, 24).shape[1]
    assert torch.equal(logits[:, beginning - 1 : -1].argmax(-1), written[:, beginning:])


def test_sampling_leaves_the_programs_own_dice_alone(model: LoadedModel) -> None:
    before = torch.get_rng_state()
    sample(model, 2, 16, 0, no_progress)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("own_cache")
def test_the_text_is_written_once_and_kept(model: LoadedModel) -> None:
    first = self_text(model, 3, 16, 0, no_progress)

    def nothing_is_written(stage: str, done: int, total: int) -> None:
        raise AssertionError("it was written again")

    assert torch.equal(self_text(model, 3, 16, 0, nothing_is_written), first)
    assert self_text(model, 2, 20, 0, no_progress).shape == (2, 20)
    assert not torch.equal(self_text(model, 3, 16, 1, no_progress), first)


@pytest.mark.model
def test_the_real_model_writes_words_and_no_special_token() -> None:
    need_smollm2()
    model = load_model("smollm2", "bfloat16")
    written = sample(model, 4, 48, 0, no_progress)
    assert not set(written.flatten().tolist()) & set(model.tokenizer.all_special_ids)
    assert all(len(model.tokenizer.decode(row).split()) > 15 for row in written)


def test_smollm2_reads_what_it_wrote_beforehand(model: LoadedModel) -> None:
    smollm2 = dataclasses.replace(model, name="smollm2")
    text = self_text(smollm2, 40, 256, 3, no_progress)
    assert (text.shape, text.dtype) == ((40, 256), torch.long)
    assert len({tuple(row) for row in text.tolist()}) == 40
    assert torch.equal(text, self_text(smollm2, 40, 256, 3, no_progress))
    assert not torch.equal(text, self_text(smollm2, 40, 256, 4, no_progress))
    assert written_beforehand(161, 16, 0) is None and written_beforehand(1, 513, 0) is None


@pytest.mark.model
def test_the_text_of_smollm2_is_its_own() -> None:
    """Its perplexity is that of text sampled at temperature 1, and it has no special tokens."""
    need_smollm2()
    model = load_model("smollm2", "bfloat16")
    text = self_text(model, 4, 64, 0, no_progress)
    assert not set(text.flatten().tolist()) & set(model.tokenizer.all_special_ids)
    with torch.no_grad():
        logits = model.causal_lm(input_ids=text).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    assert 5 < loss.exp() < 30
