"""`selfpruner export`, called in this process: it writes what it measured, and says at once what it cannot do."""

import asyncio
import json
from pathlib import Path

import pytest

from daemon.cli import main
from daemon.monitor.remote import best_so_far
from tests.support.samples import put_status
from tests.support.tiny_models import save_tiny_folder
from tests.support.tiny_specs import write_text


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    write_text(folder / "data.txt", seed=1)
    write_text(folder / "calibration.txt", seed=2)
    return folder


def texts(target: Path) -> list[str]:
    sizes = ["--windows", "3", "--calibration-windows", "4", "--seqlen", "32", "--dtype", "float32"]
    return ["--data", str(target / "data.txt"), "--calibration-data", str(target / "calibration.txt"), *sizes]


def export(target: Path, out: Path, *options: str) -> int:
    model = ["--model", str(target / "model"), *texts(target)]
    return main(["export", *model, "--allocate", "owl", "--rate", "0.3", "--out", str(out), *options, "--json"])


def measured_again(folder: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    text = ["--data", str(target / "data.txt"), "--windows", "3", "--seqlen", "32", "--dtype", "float32", "--json"]
    assert main(["evaluate", str(folder), *text]) == 0
    perplexity = json.loads(capsys.readouterr().out)["perplexity"]
    assert isinstance(perplexity, float)
    return perplexity


@pytest.mark.parametrize("reconstruction", ["none", "least-squares"])
@pytest.mark.parametrize("format_", ["hf", "padded"])
def test_the_folder_measures_what_the_model_in_memory_did(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str, reconstruction: str
) -> None:
    assert export(target, tmp_path / "out", "--format", format_, "--reconstruction", reconstruction) == 0
    answer = json.loads(capsys.readouterr().out)
    assert measured_again(tmp_path / "out", target, capsys) == pytest.approx(answer["perplexity"], rel=1e-4)
    assert {"README.md", "config.json", "model.safetensors", "selfpruner.json"} <= set(answer["files"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{answer['perplexity']:.4g}" in card and f"{answer['dense_perplexity']:.4g}" in card


def test_a_folder_can_be_checked_against_its_own_card(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the texts are the same file, so that calibration takes windows of it."""
    same = ["--calibration-data", str(target / "data.txt")]
    assert export(target, tmp_path / "out", *same) == 0
    exported = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(target / "data.txt"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["perplexity"] == pytest.approx(exported["perplexity"], rel=1e-4)
    assert again["card_perplexity"] == exported["perplexity"]


def texts_of_one_name(target: Path, folder: Path) -> tuple[Path, Path]:
    """Two texts in folders of their own, the first to be scored on and the other to be measured on."""
    found = []
    for name, text in (("calib", "calibration.txt"), ("valid", "data.txt")):
        (folder / name).mkdir()
        (folder / name / "text.txt").write_bytes((target / text).read_bytes())
        found.append(folder / name / "text.txt")
    return found[0], found[1]


def test_a_text_of_the_same_name_takes_no_windows_of_the_other(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored, measured = texts_of_one_name(target, tmp_path)
    assert export(target, tmp_path / "out", "--calibration-data", str(scored), "--data", str(measured)) == 0
    exported = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(measured), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["card_perplexity"] == exported["perplexity"]
    assert again["perplexity"] == pytest.approx(exported["perplexity"], rel=1e-4)
    assert str(tmp_path) not in (tmp_path / "out" / "selfpruner.json").read_text()


def test_the_text_of_a_card_is_looked_for_by_its_name(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export(target, tmp_path / "out") == 0
    exported = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "was measured on a file 'data.txt', which was not found; pass its path with --data" in told
    monkeypatch.chdir(target)
    assert main(["evaluate", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card_perplexity"] == exported["perplexity"]


def test_a_card_claims_nothing_of_another_text(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(target, tmp_path / "out") == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--data", str(target / "calibration.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card_perplexity"] is None


def test_what_is_said_goes_before_what_the_card_says(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(target, tmp_path / "out") == 0
    exported = json.loads(capsys.readouterr().out)

    def again(*options: str) -> tuple[float, float | None]:
        assert main(["evaluate", str(tmp_path / "out"), "--data", str(target / "data.txt"), *options, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        return answer["perplexity"], answer["card_perplexity"]

    same, claimed = again("--dtype", "float32", "--seed", "0")
    assert same == pytest.approx(exported["perplexity"], rel=1e-4) and claimed == exported["perplexity"]
    rounded, claimed = again("--dtype", "bfloat16")
    assert rounded != pytest.approx(exported["perplexity"], rel=1e-6) and claimed is None
    others, claimed = again("--seed", "5")
    assert others != pytest.approx(exported["perplexity"], rel=1e-6) and claimed is None


def test_tokens_that_are_kept_are_not_chosen_by_a_seed(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_of_self_text(target, tmp_path / "out") == 0
    assert main(["evaluate", str(tmp_path / "out"), "--seed", "1"]) == 2
    assert "--seed has no effect here" in capsys.readouterr().err.splitlines()[-1]


def export_of_self_text(target: Path, out: Path, format_: str = "hf") -> int:
    sizes = ["--windows", "3", "--calibration-windows", "4", "--seqlen", "32", "--dtype", "float32"]
    model = ["--model", str(target / "model"), "--allocate", "uniform", "--rate", "0.3", *sizes]
    return main(["export", *model, "--out", str(out), "--format", format_, "--json"])


@pytest.mark.parametrize("options", [[], ["--data", "TEXT"], ["--data", "TEXT", "--windows", "2"]])
def test_a_folder_for_llama_cpp_is_refused_as_what_it_is(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert export_of_self_text(target, tmp_path / "out", "gguf") == 0
    given = [str(target / "data.txt") if each == "TEXT" else each for each in options]
    assert main(["evaluate", str(tmp_path / "out"), *given]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "is a pruned export for llama.cpp, which cannot be measured here; pass the hf" in told


@pytest.mark.parametrize("format_", ["hf", "padded"])
def test_what_the_dense_model_wrote_is_kept_to_be_measured_again(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    out = tmp_path / "out"
    assert export_of_self_text(target, out, format_) == 0
    exported = json.loads(capsys.readouterr().out)
    assert f"`selfpruner evaluate {out.name}` measures the same tokens again" in (out / "README.md").read_text()
    assert main(["evaluate", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["card_perplexity"] == exported["perplexity"]
    assert again["perplexity"] == pytest.approx(exported["perplexity"], rel=1e-4)
    assert (again["tokens"], again["seqlen"]) == (exported["tokens"], exported["seqlen"])


@pytest.mark.parametrize(
    "kept", ["{", "{}", '{"tokens": "x"}', '{"tokens": [[1, 2]]}', '{"tokens": [[1.5]]}', "TOO LARGE", None]
)
def test_a_kept_text_that_is_none_is_one_sentence(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: str | None
) -> None:
    assert export_of_self_text(target, tmp_path / "out") == 0
    file = tmp_path / "out" / "measured-text.json"
    if kept is None:
        file.unlink()
    else:
        file.write_text(json.dumps({"tokens": [[10**6] * 32] * 3}) if kept == "TOO LARGE" else kept)
    assert main(["evaluate", str(tmp_path / "out")]) == 2
    assert "give --data" in capsys.readouterr().err.splitlines()[-1]


def test_a_disk_that_is_too_small_is_told_before_anything_is_measured(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert export(target, tmp_path / "out") == 2
    assert "of disk where" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pruned", ['"x"', "[1]", '{"a": 1}', '{"perplexity": NaN}'])
def test_a_card_that_says_nonsense_is_named(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pruned: str
) -> None:
    assert export(target, tmp_path / "out") == 0
    facts = json.loads((tmp_path / "out" / "selfpruner.json").read_text())
    text = json.dumps({**facts, "pruned": "PRUNED"}).replace('"PRUNED"', pruned)
    (tmp_path / "out" / "selfpruner.json").write_text(text)
    assert main(["evaluate", str(tmp_path / "out")]) == 2
    assert "does not say what" in capsys.readouterr().err


def test_a_folder_without_a_card_needs_a_text(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(target / "model")]) == 2
    assert "give --data" in capsys.readouterr().err


def test_what_is_no_folder_of_a_model_is_said_before_a_text_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path / "nowhere")]) == 2
    assert "nowhere'; a model is named with --model" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "holds no model: it has neither selfpruner.json nor config.json" in capsys.readouterr().err


def test_rates_of_a_file_are_exported(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rates.json").write_text(json.dumps({"rates": [0.0, 0.4, 0.4, 0.4], "spec": {"rate": 0.3}}))
    model = ["--model", str(target / "model"), *texts(target), "--rates", str(tmp_path / "rates.json")]
    assert main(["export", *model, "--out", str(tmp_path / "out"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "0" not in config["per_layer_config"] and set(config["per_layer_config"]) == {"1", "2", "3"}
    assert answer["rate"] == pytest.approx(0.3, abs=0.01)


def test_the_best_of_a_search_is_exported_as_it_was_measured(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of a search that has ended is enough."""
    assert export(target, tmp_path / "first") == 0
    facts = json.loads((tmp_path / "first" / "selfpruner.json").read_text())
    (tmp_path / "runs" / "night").mkdir(parents=True)
    spec = {**facts["spec"], "model": str(target / "model")}
    for role, file in (("fitness", "data.txt"), ("calibration", "calibration.txt")):
        spec[role] = {**spec[role], "source": str(target / file)}
    record = {"search": "night", "rates": facts["rates"], "shape": facts["shape"], "spec": spec}
    (tmp_path / "runs" / "night" / "best.json").write_text(json.dumps(record))
    first = json.loads(capsys.readouterr().out)
    search = ["--search", "night", "--folder", str(tmp_path / "runs")]
    assert main(["export", *search, "--out", str(tmp_path / "second"), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["perplexity"] == first["perplexity"]
    assert second["method"] == "search night"
    (tmp_path / "runs" / "night" / "status.json").write_text("{")  # takes nothing from the rates
    assert asyncio.run(best_so_far("night", None, tmp_path / "runs")).origin == "search night"
    put_status(tmp_path / "runs" / "night", finished=False)
    assert main(["export", *search, "--out", str(tmp_path / "third")]) == 0
    said = "search night, unfinished, after 7 candidates"
    assert said in " ".join(capsys.readouterr().out.split())
    assert f"- Rates from: {said}\n" in (tmp_path / "third" / "README.md").read_text()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_rates_of_another_version_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "best.json").write_text(json.dumps({"search": "night", "rates": [0.3], "spec": {"x": 1}}))
    search = ["--search", "night", "--folder", str(tmp_path)]
    assert main(["export", *search, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "were saved by another version of Self-Pruner" in told and told.count("\n") == 1


def test_an_existing_folder_is_kept_unless_forced(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(target, tmp_path / "out") == 0
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    assert export(target, tmp_path / "out") == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    assert export(target, tmp_path / "out", "--force") == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give --search, or --model"),
        (["--search", "x", "--model", "y"], "leave out --model"),
        (["--search", "../x"], "search"),
        (["--model", "smollm2"], "either --rates FILE or --allocate"),
        (["--model", "smollm2", "--allocate", "owl", "--rate", "0.3", "--format", "onnx"], "onnx"),
        (["--search", "never-ran"], "never-ran"),
        (["--search", "x", "--seqlen", "64"], "--seqlen has no effect here"),
    ],
)
def test_what_cannot_be_exported_gets_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main(["export", *options, "--folder", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gguf_may_lie_beside_what_transformers_loads(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(target, tmp_path / "out", "--format", "gguf", "--format", "hf") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["formats"] == ["hf", "gguf"]
    (gguf,) = (name for name in answer["files"] if name.endswith(".gguf"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from_pretrained" in card and f"llama-cli -m out/{gguf}" in card and "library_name: transformers" in card
    assert measured_again(tmp_path / "out", target, capsys) == pytest.approx(answer["perplexity"], rel=1e-4)


@pytest.mark.parametrize("letters", [240, 300])
def test_a_name_that_is_too_long_is_one_sentence(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], letters: int
) -> None:
    assert export(target, tmp_path / ("a" * letters)) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "File name too long" in told and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("formats", "sentence"),
    [
        (["--format", "onnx"], "--format cannot be 'onnx': use one of hf, padded, gguf"),
        (["--format", "hf", "--format", "padded"], "would write the same files"),
        (["--gguf-type", "q8_0"], "--gguf-type q8_0 has no effect here: hf has no GGUF file"),
    ],
)
def test_formats_that_cannot_be_are_one_sentence(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], formats: list[str], sentence: str
) -> None:
    assert export(target, tmp_path / "out", *formats) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
