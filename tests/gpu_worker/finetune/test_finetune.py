"""Fine-tuning exported folders: it learns, writes what it learned, and nothing that was pruned comes back."""

import json
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from gpu_worker.export.exported_folder import read_exported, restore_pruned_sizes
from gpu_worker.export.padded import write_padded
from gpu_worker.finetune.checkpoint import check_finetuning_disk
from gpu_worker.finetune.eval_texts import EvalText
from gpu_worker.finetune.trainable import trained
from gpu_worker.finetune.training import batch_of, learning_rate, steps_of
from gpu_worker.models.errors import NotFiniteError
from gpu_worker.models.loading import load_model
from gpu_worker.models.machine import Machine
from gpu_worker.models.memory import Training, Workload, estimate_memory
from gpu_worker.models.placement import place
from protocol.errors import DataError, ModelError, SettingsError, UsageError
from protocol.plans.spec import Dtype
from protocol.results.commands import SearchSummary
from protocol.results.finetuning import Recipe
from protocol.results.formats import Destination, Format
from tests.support.exports import UNEVEN, export, loaded_elsewhere, pruned
from tests.support.finetunes import QUICK, exported, finetuned, logits_in, weights_in
from tests.support.tiny_models import LAYOUTS, tiny_model, tiny_windows

FULL = QUICK.model_copy(update={"method": "full", "learning_rate": 0.005})


@pytest.mark.parametrize(
    ("family", "fmt", "recipe"),
    [
        *((family, "hf", QUICK) for family in LAYOUTS),
        *((family, "padded", recipe) for family in ("llama", "phi3") for recipe in (QUICK, FULL)),
        ("llama", "hf", FULL),
    ],
    ids=lambda value: getattr(value, "method", value),
)
def test_loss_and_perplexity_fall_and_the_folder_measures_what_was_told(
    tmp_path: Path, family: str, fmt: Format, recipe: Recipe
) -> None:
    folder = exported(tmp_path / "pruned", family, fmt)
    result = finetuned(folder, tmp_path / "out", recipe)
    tuned = result.finetuning
    assert tuned.last_loss < tuned.first_loss
    assert tuned.perplexity is not None and tuned.perplexity.after < 0.9 * tuned.perplexity.before
    again = finetuned(tmp_path / "out", tmp_path / "again", recipe.model_copy(update={"max_steps": 1}))
    assert again.finetuning.perplexity is not None
    assert again.finetuning.perplexity.before == pytest.approx(tuned.perplexity.after, rel=1e-5)
    assert result.formats == (fmt,) and not (tmp_path / "out.checkpoint").exists()


@pytest.mark.parametrize("family", LAYOUTS)
def test_merged_additions_compute_what_they_did_beside_the_weights(tmp_path: Path, family: str) -> None:
    model = load_model(str(exported(tmp_path / "pruned", family)), "float32")
    tokens = tiny_windows(2, 24)
    before = model.causal_lm(input_ids=tokens).logits
    linears = [type(linear) for layer in model.decoder.layers for linear in layer.linears]
    with trained(model, QUICK) as parameters, torch.no_grad():
        # Two factors for each of seven projections.
        assert len(parameters.masters) == 2 * 7 * len(model.decoder.layers)
        for master in parameters.masters:
            master.add_(0.1)
        parameters.write_back()
        model.causal_lm.eval()
        beside = model.causal_lm(input_ids=tokens).logits
    merged = model.causal_lm(input_ids=tokens).logits
    assert not torch.allclose(before, beside, atol=0.1)
    assert torch.allclose(merged, beside, atol=1e-4)
    assert [type(linear) for layer in model.decoder.layers for linear in layer.linears] == linears
    assert not [name for name, p in model.causal_lm.named_parameters() if p.requires_grad or "lora" in name]


@pytest.mark.parametrize("fmt", ["hf", "padded"])
def test_nothing_but_projections_changes(tmp_path: Path, fmt: Format) -> None:
    folder = exported(tmp_path / "pruned", fmt=fmt)
    finetuned(folder, tmp_path / "out", FULL)
    before, after = weights_in(folder), weights_in(tmp_path / "out")
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_was_pruned_stays_nought_in_a_padded_folder(tmp_path: Path, family: str) -> None:
    padded = exported(tmp_path / "padded", family, "padded")
    finetuned(padded, tmp_path / "out")
    before, after = weights_in(padded), weights_in(tmp_path / "out")
    gone = {name: weight == 0 for name, weight in before.items() if "proj" in name}
    assert all(torch.equal(after[name] == 0, zeros) for name, zeros in gone.items())
    assert sum(int(zeros.sum()) for zeros in gone.values()) > 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_it_makes_no_difference_which_format_was_read(tmp_path: Path, family: str) -> None:
    for fmt in ("hf", "padded"):
        finetuned(exported(tmp_path / fmt, family, fmt), tmp_path / f"out-{fmt}")
    assert torch.allclose(logits_in(tmp_path / "out-hf"), logits_in(tmp_path / "out-padded"), atol=1e-4)


def test_a_cut_padded_model_is_padded_again_bit_by_bit(tmp_path: Path) -> None:
    folder = export(pruned(tiny_model("llama", bias=True)), "padded", tmp_path / "padded")
    exported(tmp_path / "with-tokenizer", fmt="padded")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tmp_path / "with-tokenizer" / file).read_bytes())
    model = load_model(str(folder), "float32")
    restore_pruned_sizes(model, read_exported(folder))
    assert model.decoder.layers[0].gate.out_features == UNEVEN.layers[0].mlp_channels
    (tmp_path / "again").mkdir()
    write_padded(model, UNEVEN, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_gguf_lies_beside_what_transformers_loads(tmp_path: Path) -> None:
    """It makes no difference which format is written, and the next fine-tuning writes the same ones."""
    folder = exported(tmp_path / "pruned")
    places = [tmp_path / "hf", tmp_path / "padded"]
    for out in places:
        result = finetuned(folder, out, formats=(out.name, "gguf"))
        wanted = {"model.safetensors", "README.md", f"{out.name}-F16.gguf", "finetune.json"}
        assert wanted <= set(result.files)
    loaded = loaded_elsewhere(places, tiny_windows(2, 24), tmp_path)
    for out in places:
        assert torch.allclose(loaded[out]["logits"], logits_in(places[0]), atol=1e-4)
    assert finetuned(places[0], tmp_path / "again").formats == ("hf", "gguf")
    with pytest.raises(UsageError, match="exists"):
        finetuned(folder, places[0])
    finetuned(folder, places[0], force=True)
    assert not list(places[0].glob("*.gguf"))


def test_card_and_curve_say_what_was_done(tmp_path: Path) -> None:
    folder = exported(tmp_path / "pruned")
    result = finetuned(folder, tmp_path / "out")
    perplexity = result.finetuning.perplexity
    assert perplexity is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "LoRA (r 8, α 16, dropout 0.05)" in card
        and "windows of text from words.txt; 12 steps with batch size 4" in card
    )
    assert f"perplexity {perplexity.before:.4g} before and {perplexity.after:.4g} after, on measured.txt" in card
    assert "not retrained" not in card and "pruned and fine-tuned" in card and str(tmp_path) not in card
    assert "\n\n\n" not in card
    curve = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert [point["step"] for point in curve["losses"]] == list(range(1, 13))
    assert curve["recipe"]["rank"] == 8 and (tmp_path / "out" / "loss.png").stat().st_size > 1000
    assert read_exported(tmp_path / "out").facts.finetunings == (result.finetuning,)


def test_a_report_text_is_measured_too_and_the_dense_figure_stays_on_equal_tokens(tmp_path: Path) -> None:
    folder = exported(tmp_path / "pruned")
    text = str(tmp_path / "measured.txt")
    report = EvalText(text, 3, 32)
    first = finetuned(folder, tmp_path / "out", report_text=report)
    told = first.finetuning.report_perplexity
    assert told is not None and told.after < told.before and told.tokens == 3 * 31
    mark = tmp_path / "out" / "selfpruner.json"
    facts = read_exported(tmp_path / "out").facts
    assert facts.pruned_report is not None and facts.pruned_report.perplexity == told.after
    assert facts.spec.report == told.text and facts.dense_report is None and facts.report_digest is not None
    searched = SearchSummary(evaluations=9, seconds=1.0, uniform_perplexity=8.5, uniform_report_perplexity=9.5)
    more = {"dense_report": {"perplexity": 7.5, "tokens": 93}, "searched": searched.model_dump()}
    mark.write_text(json.dumps(json.loads(mark.read_text()) | more))
    finetuned(tmp_path / "out", tmp_path / "again", report_text=report)
    finetuned(tmp_path / "out", tmp_path / "others", report_text=EvalText(text, 2, 32))
    again, others = (read_exported(tmp_path / name).facts for name in ("again", "others"))
    assert again.dense_report is not None and again.dense_report.perplexity == 7.5 and others.dense_report is None
    assert again.searched == searched
    assert others.searched == searched.model_copy(update={"uniform_report_perplexity": None})
    assert f"{told.before:.4g} before and {told.after:.4g} after" in (tmp_path / "out" / "README.md").read_text()


def test_without_a_text_nothing_is_claimed(tmp_path: Path) -> None:
    result = finetuned(exported(tmp_path / "pruned"), tmp_path / "out", eval_text=None)
    assert result.finetuning.perplexity is None
    assert read_exported(tmp_path / "out").facts.pruned is None
    assert "The perplexity was not measured." in (tmp_path / "out" / "README.md").read_text()


def test_a_loss_that_is_no_number_ends_it_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="lower the learning rate"):
        finetuned(exported(tmp_path / "pruned"), tmp_path / "out", FULL.model_copy(update={"learning_rate": 1e30}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "warnings"), [("bfloat16", 1), ("float32", 0)])
def test_a_type_that_this_cpu_trains_slowly_in_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Dtype, warnings: int
) -> None:
    monkeypatch.setattr("gpu_worker.measuring.half_precision.is_slow", lambda dtype: dtype == torch.bfloat16)
    with capture_logs() as logs:
        result = finetuned(exported(tmp_path / "pruned"), tmp_path / "out", dtype=dtype)
    said = [line["advice"] for line in logs if line["event"] == "half_precision_is_slow"]
    assert len(said) == warnings and all("training is nearly twice as fast in float32" in s for s in said)
    perplexity = result.finetuning.perplexity
    assert perplexity is not None and perplexity.after < 0.9 * perplexity.before
    assert weights_in(tmp_path / "out")["model.norm.weight"].dtype == getattr(torch, dtype)


def test_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="float16"):
        finetuned(exported(tmp_path / "pruned"), tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("name", ["gguf", "plain", "changed"])
def test_what_is_no_hf_or_padded_export_is_refused(tmp_path: Path, name: str) -> None:
    fmt: Format = "gguf" if name == "gguf" else "hf"
    folder = exported(tmp_path / "pruned", fmt=fmt)
    mark = folder / "selfpruner.json"
    if name == "plain":
        mark.unlink()
    if name == "changed":
        told = json.loads(mark.read_text())
        told["plan"]["layers"][0]["mlp_channels"] = 21
        mark.write_text(json.dumps(told))
    sentence = {"gguf": "llama.cpp", "plain": "was not written by", "changed": "other sizes"}[name]
    with pytest.raises(ModelError, match=sentence):
        finetuned(folder, tmp_path / "out")


def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a b")
    with pytest.raises(DataError, match="too short"):
        finetuned(exported(tmp_path / "pruned"), tmp_path / "out", data=str(tmp_path / "short.txt"))


def test_every_example_is_seen_once_in_an_epoch_and_each_epoch_has_its_own_order() -> None:
    recipe = Recipe(batch=4, epochs=2)
    assert steps_of(recipe, 10) == 6
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in batch_of(recipe, 10, step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    recipe = Recipe(learning_rate=1.0, warmup=0.1, schedule="linear")
    assert learning_rate(recipe, 0.05) == pytest.approx(0.5)
    assert learning_rate(recipe, 0.1) == pytest.approx(1.0)
    assert learning_rate(recipe, 0.55) == pytest.approx(0.5)
    assert learning_rate(recipe.model_copy(update={"schedule": "cosine"}), 1.0) == pytest.approx(0.0)


def test_memory_and_disk_are_reckoned_before_anything_is_loaded(tmp_path: Path) -> None:
    model = tiny_model("llama")
    workloads = [Workload(32, training=Training(Recipe(method=method))) for method in ("lora", "full")]
    lora, full = (estimate_memory(model.decoder, torch.bfloat16, workload, "cpu") for workload in workloads)
    assert 0 < lora.training_state < full.training_state == 16 * model.decoder.shape.decoder_parameters
    assert "for what is trained" in full.description
    with pytest.raises(ModelError, match=r"for what is trained; .*; use .* a smaller micro-batch"):
        place(full, Machine(gpus=(), main_memory=1000))
    huge = model.decoder.shape.model_copy(update={"other_parameters": 10**16})
    with pytest.raises(ModelError, match="of disk"):
        check_finetuning_disk(huge, 0, Recipe(), "bfloat16", Destination(tmp_path / "x", ("hf",)))
