"""`selfpruner export`, called in this process: it writes what it measured, and says at once what it cannot do."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import main
from daemon.monitor.remote import best_so_far
from tests.support.cli import Cli
from tests.support.samples import put_status

UNIFORM = ["--model", "smollm2", "--allocate", "uniform", "--rate", "0.3"]
SIZES = ["--windows", "3", "--calibration-windows", "4", "--seqlen", "32", "--dtype", "float32"]


class Exports:
    """Exports of the tiny model, and evaluations of what was exported."""

    def __init__(self, cli: Cli, target: Path, folder: Path) -> None:
        self.cli, self.target, self.folder = cli, target, folder
        self.data, self.out = target / "data.txt", folder / "out"

    def command(self, *options: object) -> list[object]:
        texts = ["--data", self.data, "--calibration-data", self.target / "calibration.txt", *SIZES]
        return ["export", "--model", self.target / "model", *texts, *self.by("owl"), *options]

    def of_self_text(self, *options: str) -> list[object]:
        """Without a text: the dense model writes it."""
        return ["export", "--model", self.target / "model", *SIZES, *self.by("uniform"), *options]

    def by(self, method: str) -> list[object]:
        return ["--allocate", method, "--rate", "0.3", "--out", self.out]

    def made(self, *options: object) -> dict[str, Any]:
        return self.cli.answer(*self.command(*options))

    def evaluated(self, *options: object) -> dict[str, Any]:
        return self.cli.answer("evaluate", self.out, *options)

    def refused(self, *options: object) -> str:
        """The sentence in which the evaluation is refused."""
        return self.cli.error("evaluate", self.out, *options)

    @property
    def facts(self) -> Path:
        return self.out / "selfpruner.json"

    @property
    def card(self) -> str:
        return (self.out / "README.md").read_text()


@pytest.fixture
def exports(cli: Cli, target: Path, tmp_path: Path) -> Exports:
    return Exports(cli, target, tmp_path)


@pytest.fixture(scope="module")
def _self_export(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Exports(None, target, tmp_path_factory.mktemp("self"))  # type: ignore[arg-type]
    assert main([str(each) for each in made.of_self_text()]) == 0
    return made.out


@pytest.fixture
def self_export(_self_export: Path, exports: Exports) -> Exports:
    """An export whose text the dense model wrote, as files of its own."""
    shutil.copytree(_self_export, exports.out)
    return exports


@pytest.mark.parametrize("reconstruction", ["none", "least-squares"])
@pytest.mark.parametrize("format_", ["hf", "padded"])
def test_the_folder_measures_what_the_model_in_memory_did(exports: Exports, format_: str, reconstruction: str) -> None:
    answer = exports.made("--format", format_, "--reconstruction", reconstruction)
    again = exports.evaluated("--data", exports.data, "--windows", "3", "--seqlen", "32", "--dtype", "float32")
    assert again["perplexity"] == pytest.approx(answer["perplexity"], rel=1e-4)
    assert {"README.md", "config.json", "model.safetensors", "selfpruner.json"} <= set(answer["files"])
    assert f"{answer['perplexity']:.4g}" in exports.card and f"{answer['dense_perplexity']:.4g}" in exports.card


def test_a_folder_can_be_checked_against_its_own_card(exports: Exports) -> None:
    """Also where the texts are the same file, so that calibration takes windows of it."""
    exported = exports.made("--calibration-data", exports.data)
    again = exports.evaluated("--data", exports.data)
    assert again["perplexity"] == pytest.approx(exported["perplexity"], rel=1e-4)
    assert again["card_perplexity"] == exported["perplexity"]


def test_a_text_of_the_same_name_takes_no_windows_of_the_other(exports: Exports, tmp_path: Path) -> None:
    scored, measured = tmp_path / "calib" / "text.txt", tmp_path / "valid" / "text.txt"
    for copy, text in ((scored, "calibration.txt"), (measured, "data.txt")):
        copy.parent.mkdir()
        copy.write_bytes((exports.target / text).read_bytes())
    exported = exports.made("--calibration-data", scored, "--data", measured)
    again = exports.evaluated("--data", measured)
    assert again["card_perplexity"] == exported["perplexity"]
    assert again["perplexity"] == pytest.approx(exported["perplexity"], rel=1e-4)
    assert str(tmp_path) not in exports.facts.read_text()


def test_the_text_of_a_card_is_looked_for_by_its_name(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = exports.made()
    assert "was measured on a file 'data.txt', which was not found; pass its path with --data" in exports.refused()
    monkeypatch.chdir(exports.target)
    assert exports.evaluated()["card_perplexity"] == exported["perplexity"]
    another = exports.evaluated("--data", "calibration.txt")
    assert another["card_perplexity"] is None, "the card claims nothing of another text"
    assert another["card_texts"] == "data.txt"
    _, out, _ = exports.cli.run("evaluate", exports.out, "--data", "calibration.txt")
    assert "is of other tokens than those of --data: give the card's texts (data.txt), without sizes" in " ".join(
        out.split()
    )


@pytest.fixture
def reported(exports: Exports, target: Path, tmp_path: Path) -> Path:
    """An export with figures on a report text, whose file this is."""
    report = tmp_path / "report.txt"
    report.write_bytes((target / "calibration.txt").read_bytes())
    exports.made("--calibration-data", exports.data, "--report-data", report, "--report-windows", "2")
    return report


def test_both_rows_of_a_card_are_measured_again_with_the_windows_that_it_states(
    exports: Exports, reported: Path
) -> None:
    facts = json.loads(exports.facts.read_text())
    again = exports.evaluated("--data", exports.data, "--report-data", reported)
    assert again["card_perplexity"] == facts["pruned"]["perplexity"]
    assert again["card_report_perplexity"] == facts["pruned_report"]["perplexity"]
    assert again["report_perplexity"] == pytest.approx(facts["pruned_report"]["perplexity"], rel=1e-4)


def test_the_report_text_of_a_card_alone_is_known_by_its_name(exports: Exports, reported: Path) -> None:
    facts = json.loads(exports.facts.read_text())
    again = exports.evaluated("--data", reported)
    assert again["card_perplexity"] == facts["pruned_report"]["perplexity"]
    assert again["perplexity"] == pytest.approx(facts["pruned_report"]["perplexity"], rel=1e-4)


def test_other_numbers_of_windows_are_not_taken_for_those_of_the_card(exports: Exports, reported: Path) -> None:
    again = exports.evaluated("--data", reported, "--windows", "3", "--seqlen", "32")
    assert again["card_perplexity"] is None and again["card_texts"] == "data.txt and report.txt"


def test_what_is_said_goes_before_what_the_card_says(exports: Exports) -> None:
    exported = exports.made()

    def again(*options: str) -> tuple[float, float | None]:
        answer = exports.evaluated("--data", exports.data, *options)
        return answer["perplexity"], answer["card_perplexity"]

    same, claimed = again("--dtype", "float32", "--seed", "0")
    assert same == pytest.approx(exported["perplexity"], rel=1e-4) and claimed == exported["perplexity"]
    for options in (["--dtype", "bfloat16"], ["--seed", "5"]):
        other, claimed = again(*options)
        assert other != pytest.approx(exported["perplexity"], rel=1e-6) and claimed is None


def test_tokens_that_are_kept_are_not_chosen_by_a_seed(self_export: Exports) -> None:
    assert "--seed has no effect here" in self_export.refused("--seed", "1")


def test_a_report_text_is_measured_beside_the_text_that_the_model_wrote(self_export: Exports) -> None:
    alone, both = self_export.evaluated(), self_export.evaluated("--report-data", self_export.data)
    assert both["perplexity"] == alone["perplexity"] and both["report_perplexity"] is not None


def test_a_report_on_the_same_text_is_one_row_more_and_another_text_is_refused(exports: Exports) -> None:
    exports.made("--report-data", exports.data, "--report-windows", "2")
    facts = json.loads(exports.facts.read_text())
    again = exports.evaluated("--data", exports.data, "--report-data", exports.data)
    assert again["card_report_perplexity"] == facts["pruned_report"]["perplexity"]
    other = exports.target / "calibration.txt"
    told = exports.refused("--data", exports.data, "--report-data", other)
    assert "the report windows are from the text of --data: leave out --report-data" in told


def test_a_folder_for_llama_cpp_is_refused_as_what_it_is(exports: Exports) -> None:
    exports.cli.answer(*exports.of_self_text("--format", "gguf"))
    for options in ([], ["--data", exports.data], ["--data", exports.data, "--windows", "2"]):
        told = exports.refused(*options)
        assert "is a pruned export for llama.cpp, which cannot be measured here; pass the hf" in told


@pytest.mark.parametrize("format_", ["hf", "padded"])
def test_what_the_dense_model_wrote_is_kept_to_be_measured_again(exports: Exports, format_: str) -> None:
    exported = exports.cli.answer(*exports.of_self_text("--format", format_))
    assert "`selfpruner evaluate out` measures the same tokens again" in exports.card
    again = exports.evaluated()
    assert again["card_perplexity"] == exported["perplexity"]
    assert again["perplexity"] == pytest.approx(exported["perplexity"], rel=1e-4)
    assert (again["tokens"], again["seqlen"]) == (exported["tokens"], exported["seqlen"])


@pytest.mark.parametrize(
    "kept", ["{", "{}", '{"tokens": "x"}', '{"tokens": [[1, 2]]}', '{"tokens": [[1.5]]}', "TOO LARGE", None]
)
def test_a_kept_text_that_is_none_is_one_sentence(self_export: Exports, kept: str | None) -> None:
    file = self_export.out / "measured-text.json"
    if kept is None:
        file.unlink()
    else:
        file.write_text(json.dumps({"tokens": [[10**6] * 32] * 3}) if kept == "TOO LARGE" else kept)
    assert "give --data" in self_export.refused()


def test_a_disk_that_is_too_small_is_told_before_anything_is_measured(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert "of disk where" in exports.cli.error(*exports.command())
    assert list(exports.folder.iterdir()) == []


@pytest.mark.parametrize("pruned", ['"x"', "[1]", '{"a": 1}', '{"perplexity": NaN}'])
def test_a_card_that_says_nonsense_is_named(self_export: Exports, pruned: str) -> None:
    text = json.dumps({**json.loads(self_export.facts.read_text()), "pruned": "PRUNED"})
    self_export.facts.write_text(text.replace('"PRUNED"', pruned))
    assert "does not say what" in self_export.refused()


def test_a_folder_without_a_card_needs_a_text(target: Path, cli: Cli) -> None:
    assert "give --data" in cli.error("evaluate", target / "model")


def test_what_is_no_folder_of_a_model_is_said_before_a_text_is_asked_for(tmp_path: Path, cli: Cli) -> None:
    assert "nowhere'; name a model with --model" in cli.error("evaluate", tmp_path / "nowhere")
    assert "holds no model: it has neither selfpruner.json nor config.json" in cli.error("evaluate", tmp_path)


def test_rates_of_a_file_are_exported(exports: Exports) -> None:
    file = exports.folder / "rates.json"
    file.write_text(json.dumps({"rates": [0.0, 0.4, 0.4, 0.4], "spec": {"rate": 0.3}}))
    model = ["--model", exports.target / "model", "--data", exports.data, *SIZES]
    answer = exports.cli.answer("export", *model, "--rates", file, "--out", exports.out)
    config = json.loads((exports.out / "config.json").read_text())
    assert "0" not in config["per_layer_config"] and set(config["per_layer_config"]) == {"1", "2", "3"}
    assert answer["rate"] == pytest.approx(0.3, abs=0.01)


def test_the_best_of_a_search_is_exported_as_it_was_measured(exports: Exports, tmp_path: Path) -> None:
    """The folder of a search that has ended is enough."""
    first = exports.made()
    facts = json.loads(exports.facts.read_text())
    night = tmp_path / "runs" / "night"
    night.mkdir(parents=True)
    spec = {**facts["spec"], "model": str(exports.target / "model")}
    for role, file in (("fitness", "data.txt"), ("calibration", "calibration.txt")):
        spec[role] = {**spec[role], "source": str(exports.target / file)}
    record = {"search": "night", "rates": facts["rates"], "shape": facts["shape"], "spec": spec}
    (night / "best.json").write_text(json.dumps(record))
    search = ["export", "--search", "night", "--folder", tmp_path / "runs", "--out"]
    second = exports.cli.answer(*search, tmp_path / "second")
    assert (second["perplexity"], second["method"]) == (first["perplexity"], "search night")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (exports.out, tmp_path / "second")]
    assert weights[0] == weights[1]
    (night / "status.json").write_text("{")  # takes nothing from the rates
    assert asyncio.run(best_so_far("night", None, tmp_path / "runs")).origin == "search night"
    put_status(night, finished=False)
    _, shown, _ = exports.cli.run(*search, tmp_path / "third")
    said = "search night, unfinished, after 7 candidates"
    assert said in " ".join(shown.split())
    assert f"- Rates from: {said}\n" in (tmp_path / "third" / "README.md").read_text()


def test_rates_of_another_version_are_one_sentence(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "best.json").write_text(json.dumps({"search": "night", "rates": [0.3], "spec": {"x": 1}}))
    code, _, err = cli.run("export", "--search", "night", "--folder", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and "were saved by another version of Self-Pruner" in err and err.count("\n") == 1


def test_an_existing_folder_is_kept_unless_forced(self_export: Exports) -> None:
    config = self_export.out / "config.json"
    before = config.stat().st_mtime_ns
    assert "exists" in self_export.cli.error(*self_export.command())
    assert config.stat().st_mtime_ns == before
    self_export.made("--force")
    assert config.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "give --search, or --model"),
        (["--search", "x", "--model", "y"], "leave out --model"),
        (["--search", "../x"], "search"),
        (["--model", "smollm2"], "either --rates FILE or --allocate"),
        ([*UNIFORM, "--format", "onnx"], "--format cannot be 'onnx': use one of hf, padded, gguf"),
        ([*UNIFORM, "--format", "hf", "--format", "padded"], "would write the same files"),
        ([*UNIFORM, "--gguf-type", "q8_0"], "--gguf-type q8_0 has no effect here: hf has no GGUF file"),
        (["--search", "never-ran"], "never-ran"),
        (["--search", "x", "--seqlen", "64"], "--seqlen has no effect here"),
    ],
)
def test_what_cannot_be_exported_gets_one_sentence(tmp_path: Path, cli: Cli, options: list[str], sentence: str) -> None:
    assert sentence in cli.error("export", *options, "--folder", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_may_lie_beside_what_transformers_loads(exports: Exports) -> None:
    answer = exports.made("--format", "gguf", "--format", "hf")
    assert answer["formats"] == ["hf", "gguf"]
    (gguf,) = (name for name in answer["files"] if name.endswith(".gguf"))
    for part in ("from_pretrained", f"llama-cli -m out/{gguf}", "library_name: transformers"):
        assert part in exports.card
    assert exports.evaluated("--data", exports.data)["perplexity"] == pytest.approx(answer["perplexity"], rel=1e-4)


@pytest.mark.parametrize("letters", [240, 300])
def test_a_name_that_is_too_long_is_one_sentence(exports: Exports, letters: int) -> None:
    assert "File name too long" in exports.cli.error(*exports.command("--out", exports.folder / ("a" * letters)))
    assert list(exports.folder.iterdir()) == []
