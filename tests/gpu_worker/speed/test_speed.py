"""How a speed is measured: dense and pruned in turn, medians of ratios, exact bytes; and what cannot be measured."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.cli import main
from gpu_worker.export.folder import formats_in
from gpu_worker.models.machine import Machine
from gpu_worker.speed.compatibility import Sizes, check_memory, check_pruned_from
from gpu_worker.speed.engines import ENGINES, EngineFacts, choose_engines, engines_named
from gpu_worker.speed.timing import Pair, Timing, alternate, compare
from gpu_worker.speed.transformers_engine import TransformersRunner
from protocol.errors import ModelError, SettingsError, UsageError
from protocol.plans.shape import LayerShape
from protocol.results.formats import Engine
from protocol.results.speeds import ModelSize
from tests.support.exports import export, pruned, with_tokenizer
from tests.support.pruned_models import keep
from tests.support.tiny_models import save_tiny_folder, tiny_llama


class Told:
    """A runner that writes down that it ran, and takes the seconds that it is told to."""

    def __init__(self, name: str, runs: list[str], seconds: Iterator[tuple[float, float]]) -> None:
        self._name = name
        self._runs = runs
        self._seconds = seconds

    def run(self, batch_size: int) -> Timing:
        self._runs.append(f"{self._name}{batch_size}")
        prefill, decode = next(self._seconds)
        return Timing(100 * batch_size, prefill, 10 * batch_size, decode)

    def size(self) -> ModelSize:
        raise AssertionError("nobody asks")


def pair_of(runs: list[str], dense: list[tuple[float, float]], of_pruned: list[tuple[float, float]]) -> Pair:
    return Pair(Told("A", runs, iter(dense)), Told("B", runs, iter(of_pruned)))


def test_dense_and_pruned_run_in_turn_and_the_warm_up_does_not_count() -> None:
    runs: list[str] = []
    pair = pair_of(runs, [(99.0, 99.0), (1.0, 2.0), (1.0, 2.0)], [(99.0, 99.0), (0.5, 1.0), (0.25, 1.0)])
    told: list[tuple[int, int]] = []
    found = list(alternate(pair, 3, 2, warm_up=1, progress=lambda _, done, total: told.append((done, total))))
    assert runs == ["A3", "B3"] * 3
    assert [each[0].prefill_seconds for each in found] == [1.0, 1.0]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_the_speed_up_is_the_median_of_the_ratios_of_neighbours() -> None:
    """A machine that slows down threefold after the first repeat slows both: the ratio stays what it is."""
    dense = [(1.0, 3.0), (3.0, 9.0), (3.0, 9.0)]
    of_pruned = [(0.5, 1.0), (1.5, 3.0), (2.0, 3.0)]
    batch = compare(1, list(alternate(pair_of([], dense, of_pruned), 1, 3, warm_up=0)))
    assert (batch.prefill.tokens, batch.decode.tokens) == (100, 10)
    assert batch.prefill.dense.model_dump() == pytest.approx({"median": 100 / 3, "lowest": 100 / 3, "highest": 100})
    assert batch.prefill.pruned.model_dump() == pytest.approx({"median": 200 / 3, "lowest": 50, "highest": 200})
    assert batch.prefill.speed_up.model_dump() == pytest.approx({"median": 2, "lowest": 1.5, "highest": 2})
    assert batch.decode.speed_up.model_dump() == pytest.approx({"median": 3, "lowest": 3, "highest": 3})


def test_a_batch_counts_the_tokens_of_all_its_texts() -> None:
    batch = compare(4, list(alternate(pair_of([], [(1.0, 1.0)], [(1.0, 1.0)]), 4, 1, warm_up=0)))
    assert (batch.prefill.tokens, batch.decode.tokens) == (400, 40)
    assert batch.decode.dense.median == 40


def test_what_takes_no_time_is_no_rate() -> None:
    with pytest.raises(UsageError, match="give a larger --prompt"):
        compare(1, [(Timing(1, 1.0, 1, 1.0), Timing(1, 0.0, 1, 1.0))])


def installed(*names: Engine) -> dict[Engine, EngineFacts]:
    return {
        name: EngineFacts("json" if name in names else "no_such_package", facts.pip, facts.formats)
        for name, facts in ENGINES.items()
    }


def test_all_installed_engines_that_can_run_the_format_do_and_others_say_why_not() -> None:
    chosen, skipped = choose_engines((), ("hf",), installed("transformers", "llama.cpp"))
    assert chosen == ("transformers", "llama.cpp")
    assert skipped == {"vllm": "the engine vllm is not installed: pip install 'vllm>=0.28'"}
    chosen, skipped = choose_engines((), ("gguf",), installed("transformers", "llama.cpp"))
    assert chosen == ("llama.cpp",) and set(skipped) == {"transformers", "vllm"}
    chosen, _ = choose_engines((), ("padded", "gguf"), installed("transformers", "llama.cpp"))
    assert chosen == ("transformers", "llama.cpp")


@pytest.mark.parametrize(
    ("asked", "fmt", "sentence"),
    [
        (("vllm",), "hf", r"the engine vllm is not installed: pip install 'vllm>=0\.28'"),
        (("llama.cpp",), "padded", "llama.cpp cannot run an export in the format padded; it runs hf and gguf"),
        ((), "gguf", "no engine here can run the folder: .*'\\.\\[local\\]'"),
    ],
)
def test_an_engine_that_cannot_is_one_sentence(asked: tuple[Engine, ...], fmt: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        choose_engines(asked, (fmt,), installed("transformers"))  # type: ignore[arg-type]


def test_engines_are_named_as_they_are() -> None:
    assert engines_named(["llama.cpp", "transformers", "llama.cpp"]) == ("llama.cpp", "transformers")
    with pytest.raises(SettingsError, match=r"no engine 'onnx'; there are transformers, llama\.cpp, vllm"):
        engines_named(["onnx"])


LAYER = LayerShape(query_heads=4, kv_heads=2, mlp_channels=64)
NARROW = LAYER.model_copy(update={"mlp_channels": 63})
SIZES = Sizes("llama", 64, 320, 16, (LAYER, LAYER))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (Sizes("qwen2", 64, 320, 16, (LAYER, LAYER)), "model type is qwen2, not llama"),
        (Sizes("llama", 64, 321, 16, (LAYER, LAYER)), "vocabulary is 321, not 320"),
        (Sizes("llama", 32, 320, 16, (LAYER, LAYER)), "hidden size is 32, not 64"),
        (Sizes("llama", 64, 320, 8, (LAYER, LAYER)), "head width is 8, not 16"),
        (Sizes(None, 64, 320, 16, (LAYER,)), "number of layers is 1, not 2"),
        (Sizes("llama", 64, 320, 16, (LAYER, NARROW)), "smaller than the pruned model in layer 1"),
    ],
)
def test_a_baseline_of_another_model_is_one_sentence(other: Sizes, what: str) -> None:
    check_pruned_from(SIZES, SIZES, "dense")
    with pytest.raises(ModelError, match=what):
        check_pruned_from(other, SIZES, "dense")


def test_models_that_do_not_fit_are_one_sentence() -> None:
    check_memory(1, on_gpu=True)
    with pytest.raises(ModelError, match=r"need about 1000000\.0 GB more where .*use smaller batches"):
        check_memory(10**15, on_gpu=False)


def test_room_is_looked_for_where_the_engine_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(main_memory=100 * 10**9, gpus=(10 * 10**9,))
    monkeypatch.setattr("gpu_worker.speed.compatibility.this_machine", lambda: machine)
    check_memory(50 * 10**9, on_gpu=False)
    with pytest.raises(ModelError, match=r"need about 50\.0 GB more"):
        check_memory(50 * 10**9, on_gpu=True)


@pytest.mark.parametrize(
    ("mark", "sentence"),
    [
        (None, "was not written by `selfpruner export`: it has no selfpruner.json"),
        ("{", "does not say in which format"),
        ("[]", "does not say in which format"),
        ('{"formats": ["onnx"]}', "names the unknown format 'onnx'; there are hf, padded, gguf"),
    ],
)
def test_a_folder_that_is_no_export_is_one_sentence(
    mark: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if mark is not None:
        (tmp_path / "selfpruner.json").write_text(mark)
    with pytest.raises(ModelError, match=sentence):
        formats_in(tmp_path)
    assert main(["speed", str(tmp_path), "--baseline", "smollm2"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, another one, and an export of a pruned one."""
    folder = tmp_path_factory.mktemp("speed")
    save_tiny_folder(folder / "dense")
    save_tiny_folder(folder / "other", "qwen2", hidden_size=48)
    plan = keep((2, 1, 20), (3, 1, 48), (1, 2, 7))
    export(pruned(with_tokenizer(tiny_llama()), plan), "hf", folder / "pruned", plan)
    return folder


@pytest.mark.parametrize(
    ("baseline", "options", "sentence"),
    [
        ("other", [], "is not the model that was pruned: its model type is qwen2, not llama"),
        ("nowhere", [], "there is no folder"),
        ("dense", ["--prompt", "255"], "windows of 257 tokens are longer than the 256"),
        ("dense", ["--engine", "vllm"], "the engine vllm is not installed"),
        ("dense", ["--engine", "transformers", "--gguf-type", "q8_0"], "--gguf-type q8_0 has no effect here"),
        ("dense", ["--engine", "onnx"], "there is no engine 'onnx'"),
        ("dense", ["--batch-size", "1000000000"], "too large for this machine"),
        ("dense", ["--batch-size", "0"], "--batch-size"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    exported: Path, baseline: str, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = [] if "--engine" in options else ["--engine", "transformers"]
    command = ["speed", str(exported / "pruned"), "--generate", "2", "--prompt", "8", *engine]
    assert main([*command, "--baseline", str(exported / baseline), *options]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (None, "lacks weights: model.safetensors is missing"),
        ('{"weight_map": {"a": "model-2.safetensors"}}', "lacks weights: model-2.safetensors is missing"),
        ("[]", "does not say which files hold the weights"),
    ],
)
def test_a_folder_that_has_lost_its_weights_is_one_sentence_whatever_else_could_run(
    exported: Path, tmp_path: Path, index: str | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp would run the GGUF file that lies beside, and its figures would hide that the rest is broken."""
    folder = tmp_path / "damaged"
    shutil.copytree(exported / "pruned", folder)
    (folder / "model.safetensors").unlink()
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    assert main(["speed", str(folder), "--baseline", str(exported / "dense"), "--engine", "llama.cpp"]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_command_prints_one_object(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["speed", str(exported / "pruned"), "--baseline", str(exported / "dense"), "--dtype", "float32"]
    sizes = ["--prompt", "9", "--generate", "3", "--repeats", "2", "--batch-size", "1", "--batch-size", "2"]
    assert main([*command, *sizes, "--engine", "transformers", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (found,) = answer["engines"]
    assert [batch["prefill"]["tokens"] for batch in found["batches"]] == [9, 18]
    assert [batch["decode"]["tokens"] for batch in found["batches"]] == [3, 6]
    assert found["dense"]["decoder_parameters"] > found["pruned"]["decoder_parameters"]
    files = (exported / "pruned").glob("*.safetensors")
    assert found["pruned"]["disk_bytes"] == sum(file.stat().st_size for file in files)


def test_a_person_gets_tables(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["speed", str(exported / "pruned"), "--baseline", str(exported / "dense"), "--engine", "transformers"]
    assert main([*command, "--prompt", "9", "--generate", "3", "--repeats", "1"]) == 0
    said = capsys.readouterr().out
    for words in ("transformers on cpu", "bfloat16", "KV bytes/token", "prefill", "decode", "1 repeats after 1"):
        assert words in said


@pytest.fixture
def interrupted_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets a signal come while a model runs for the last of so many times."""
    run, runs = TransformersRunner.run, []

    def interrupt_after(most: int) -> None:
        def counted(self: TransformersRunner, batch_size: int) -> Timing:
            runs.append(batch_size)
            if len(runs) == most:
                signal.raise_signal(signal.SIGINT)
            return run(self, batch_size)

        monkeypatch.setattr(TransformersRunner, "run", counted)

    return interrupt_after


@pytest.mark.parametrize(
    ("runs", "repeats"),
    [(6, {1: 1}), (7, {1: 2}), (8, {1: 2}), (9, {1: 3}), (11, {1: 3}), (13, {1: 3, 2: 1})],
)
def test_an_interrupted_measurement_prints_the_whole_repeats_until_then(
    exported: Path,
    runs: int,
    repeats: dict[int, int],
    interrupted_after: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupted_after(runs)
    command = ["speed", str(exported / "pruned"), "--baseline", str(exported / "dense"), "--engine", "transformers"]
    sizes = ["--prompt", "9", "--generate", "3", "--repeats", "3", "--batch-size", "1", "--batch-size", "2"]
    assert main([*command, *sizes, "--json"]) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "selfpruner: interrupted; the figures are partial"
    answer = json.loads(out)
    assert answer["interrupted"] and answer["repeats"] == 3
    assert {batch["batch_size"]: batch["repeats"] for batch in answer["engines"][0]["batches"]} == repeats


def test_a_person_reads_which_repeats_an_interrupted_measurement_has(
    exported: Path, interrupted_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_after(7)
    command = ["speed", str(exported / "pruned"), "--baseline", str(exported / "dense"), "--engine", "transformers"]
    assert main([*command, "--prompt", "9", "--generate", "3"]) == 130
    said = capsys.readouterr().out
    assert said.count("2 of 5") == 2 and "partial, because the measurement was interrupted" in said


def test_an_interruption_before_the_first_repeat_leaves_no_table(
    exported: Path, interrupted_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted_after(3)
    command = ["speed", str(exported / "pruned"), "--baseline", str(exported / "dense"), "--engine", "transformers"]
    assert main([*command, "--prompt", "9", "--generate", "3"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == "selfpruner: interrupted; nothing was written"
