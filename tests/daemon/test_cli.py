"""The command line, called in this process: answers on stdout, one sentence and code 2 for what must be fixed."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from daemon.cli import main
from tests.support.samples import SHAPE
from tests.support.tiny_models import save_tiny_folder
from tests.support.tiny_specs import write_text


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    write_text(folder / "data.txt", seed=1)
    write_text(folder / "calibration.txt", seed=2)
    return folder


def evaluate(target: Path, *options: str) -> int:
    texts = ["--data", str(target / "data.txt"), "--calibration-data", str(target / "calibration.txt")]
    sizes = ["--windows", "3", "--calibration-windows", "4", "--seqlen", "32"]
    return main(["evaluate", "--model", str(target / "model"), *texts, *sizes, *options])


def test_evaluate_prints_what_uniform_pruning_costs(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(target, "--allocate", "uniform", "--rate", "0.3", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert {"perplexity", "dense_perplexity", "parameters", "seqlen", "tokens", "seconds"} <= set(answer)
    assert (answer["seqlen"], answer["tokens"]) == (32, 3 * 31)
    parameters = answer["parameters"]
    channel = 3 * 48
    assert abs(parameters["decoder_after"] - 0.7 * parameters["decoder_before"]) <= channel
    removed = parameters["decoder_before"] - parameters["decoder_after"]
    assert parameters["total_before"] - parameters["total_after"] == removed
    assert answer["perplexity"] != answer["dense_perplexity"]


def test_evaluate_takes_the_rates_of_a_file(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": [0.0, 0.4, 0.4, 0.4]}))
    assert evaluate(target, "--rates", str(file), "--rate", "0.3", "--json") == 0
    uneven = json.loads(capsys.readouterr().out)
    evaluate(target, "--allocate", "uniform", "--rate", "0.3", "--json")
    uniform = json.loads(capsys.readouterr().out)
    assert uneven["perplexity"] != uniform["perplexity"]
    assert abs(uneven["parameters"]["decoder_after"] - uniform["parameters"]["decoder_after"]) <= 2 * 3 * 48


@pytest.mark.parametrize("method", ["owl", "first-layer", "llm-pruner", "sensitivity"])
def test_allocate_writes_a_file_that_evaluate_takes(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    text = ["--calibration-data", str(target / "calibration.txt"), "--calibration-windows", "4", "--seqlen", "32"]
    sizes = {"owl": ["--outlier-threshold", "2"], "llm-pruner": ["--first-layers", "1", "--last-layers", "0"]}.get(
        method, []
    )
    assert main(["allocate", method, "--model", str(target / "model"), "--rate", "0.3", *text, *sizes, "--json"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "rates.json").write_text(printed)
    assert evaluate(target, "--rates", str(tmp_path / "rates.json"), "--json") == 0
    by_file = json.loads(capsys.readouterr().out)
    assert evaluate(target, "--allocate", method, "--rate", "0.3", *sizes, "--json") == 0
    at_once = json.loads(capsys.readouterr().out)
    assert by_file["perplexity"] == at_once["perplexity"]
    assert by_file["rates"] == at_once["rates"] == json.loads(printed)["rates"]
    assert by_file["method"] == at_once["method"] == method


def test_a_model_can_be_measured_as_it_is(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--data", str(target / "data.txt"), "--seqlen", "32", "--windows", "3"]
    assert main(["evaluate", str(target / "model"), *text, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert evaluate(target, "--allocate", "uniform", "--rate", "0.3", "--json") == 0
    pruned = json.loads(capsys.readouterr().out)
    assert answer["perplexity"] == pytest.approx(pruned["dense_perplexity"], rel=5e-3)
    assert answer["parameters"]["decoder_after"] == pruned["parameters"]["decoder_before"]


@pytest.mark.parametrize("scoring", ["dense", "sequential"])
@pytest.mark.parametrize("importance", ["wanda-sp", "taylor", "magnitude", "obs"])
def test_evaluate_scores_as_it_is_told(
    target: Path, capsys: pytest.CaptureFixture[str], importance: str, scoring: str
) -> None:
    code = evaluate(
        target, "--allocate", "uniform", "--rate", "0.3", "--importance", importance, "--scoring", scoring, "--json"
    )
    assert code == (2 if scoring == "sequential" and importance != "wanda-sp" else 0)


@pytest.mark.parametrize(
    ("rates", "sentence"),
    [
        ('[0.3, 0.3, 0.3, 0.3], "shape": ' + SHAPE.model_dump_json(), "4 llama layers of hidden size 32"),
        ("[0.3, 0.3, 0.3]", "3 pruning rates were given for 4 units"),
        ("[0.3, 0.3, 0.3, 0.5]", "off the budget 0.3 by +0.05000"),
        ("[1.2, 0, 0, 0]", "less than 1"),
        ('["0.3"]', "list of numbers"),
        ("[-Infinity, Infinity, 0.3, 0.3]", "list of numbers"),
        ("[1e308, 0, 0, 0]", "less than 1"),
        ("[" * 100_000, "list of numbers"),
        ("{", "not a JSON object"),
    ],
)
def test_a_bad_rates_file_gets_one_sentence(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rates: str, sentence: str
) -> None:
    file = tmp_path / "rates.json"
    file.write_text(f'{{"rates": {rates}}}')
    assert evaluate(target, "--rates", str(file), "--rate", "0.3") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = captured.err.strip().splitlines()[-1]
    assert said.startswith("selfpruner: ") and sentence in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--allocate", "owl", "--rates", "x.json"], "either --rates FILE or --allocate"),
        (["--allocate", "owl", "--rate", "0.3", "--importance", "taylor", "--scoring", "sequential"], "sequential"),
        (
            ["--allocate", "llm-pruner", "--rate", "0.3", "--first-layers", "3", "--last-layers", "1"],
            "no layer is left to prune",
        ),
        (["--allocate", "uniform", "--rate", "0.3", "--outlier-range", "0.1"], "--outlier-range is for --allocate owl"),
        (["--allocate", "uniform", "--rate", "0.3", "--seed", "9" * 30], "seed"),
        (["--allocate", "uniform", "--rate", "0.3", "--multiple-of", "1000"], "multiples of 1000: the narrowest MLP"),
        (["--scoring", "sequential"], "--scoring has no effect here: the model is measured as is"),
        (["--fitness", "kl"], "give --allocate or --rates"),
        (["--allocate", "magic", "--rate", "0.3"], "magic"),
        (["--allocate", "uniform"], "--allocate needs --rate"),
        (["--seed", "9" * 30], "seed"),
        (["--data", "~nobody-of-that-name/text.txt"], "that user has no home folder"),
        (["--allocate", "uniform", "--rate", "0.95"], "rate cannot be '0.95'"),
        (["--rates", "nowhere.json", "--rate", "0.3"], "cannot be read"),
        (["--allocate", "uniform", "--rate", "0.3", "--windows", "5000"], "too short"),
    ],
)
def test_bad_flags_of_evaluate_get_one_sentence(
    target: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert evaluate(target, *options) == 2
    assert sentence in capsys.readouterr().err


def test_a_model_of_another_family_is_refused_with_the_list(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    options = ["--model", str(tmp_path), "--data", str(target / "data.txt"), "--allocate", "uniform", "--rate", "0.3"]
    assert main(["evaluate", *options]) == 2
    assert "supported model types: gemma3_text, llama" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "best", "pause", "resume", "stop"])
def test_a_search_that_never_ran_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--search", "nobody", "--folder", str(tmp_path)]) == 2
    assert f"there is no search 'nobody' in {tmp_path}/, and no other" in capsys.readouterr().err


def test_a_mistyped_search_is_told_which_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("quickstart", "half"):
        (tmp_path / name).mkdir()
    assert main(["status", "--search", "qickstart", "--folder", str(tmp_path)]) == 2
    assert (
        f"there is no search 'qickstart' in {tmp_path}/; choose with --search: half, quickstart"
        in capsys.readouterr().err
    )


def test_a_search_that_is_not_running_is_told_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "quickstart").mkdir()
    assert main(["pause", "--search", "quickstart", "--folder", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "the search 'quickstart'" in said and "is not running now: `selfpruner run`" in said and ".sock" not in said


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["run", "--nonsense"], "no such option: --nonsense; see selfpruner run --help"),
        (["nonsense"], "no such command 'nonsense'; see selfpruner --help"),
        (["export"], "missing option '--out'; see selfpruner export --help"),
        (["status", "--folder"], "option '--folder' requires an argument"),
        (["evaluate", "--windows", "0"], "invalid value for '--windows': "),
        (
            ["allocate", "magic", "--model", "smollm2", "--rate", "0.3"],
            "invalid value for 'method': 'magic' is not one of 'uniform', 'first-layer', 'owl', 'llm-pruner', 'sens",
        ),
    ],
)
def test_wrong_flags_are_one_sentence_and_code_2(
    capsys: pytest.CaptureFixture[str], command: list[str], sentence: str
) -> None:
    assert main(command) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"selfpruner: {sentence}")


def test_without_a_command_there_is_help_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: selfpruner" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        ["allocate", "uniform", "--model", "smollm2", "--rate", "2"],
        ["evaluate", "--model", "smollm2", "--allocate", "uniform", "--data", "self"],
        ["export", "--model", "smollm2", "--out", "here"],
        ["export", "--model", "smollm2", "--allocate", "uniform", "--rate", "0.3", "--out", "."],
    ],
)
def test_flags_are_refused_before_torch_is_loaded(command: list[str]) -> None:
    code = f"import sys; from daemon.cli import main; code = main({command}); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_export_with_a_sentence_and_leaves_nothing(
    target: Path, tmp_path: Path, number: signal.Signals
) -> None:
    texts = ["--data", "self", "--windows", "2000", "--seqlen", "64", "--calibration-windows", "1"]
    command = [sys.executable, "-m", "daemon", "export", "--model", str(target / "model"), *texts]
    command += ["--allocate", "uniform", "--rate", "0.3", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if "writing text" in line:
                break
        process.send_signal(number)
        *_, last = process.stderr
        assert (process.wait(), process.stdout.read()) == (128 + number, "")
    assert last == "selfpruner: interrupted; nothing was written\n"
    assert not (tmp_path / "out").exists()
    assert not [path for folder in (tmp_path, tmp_path / "cache" / "selfpruner") for path in folder.glob(".*")]


def test_off_a_terminal_each_stage_is_logged(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(target, "--allocate", "uniform", "--rate", "0.3") == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.err.splitlines()]
    stages = list(dict.fromkeys(line["stage"] for line in lines if line["event"] == "progress"))
    expected = ["loading model", "reading texts", "calibrating", "scoring", "measuring dense", "measuring pruned"]
    assert stages == expected
    assert captured.out.splitlines()[-1].startswith("pruning and measuring took ")


def test_a_daemon_without_redis_or_endpoints_is_told_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "s.yaml"
    config.write_text("target: {model: smollm2, rate: 0.3}\n")
    assert main(["daemon", str(config)]) == 2
    assert "redis.url is missing" in capsys.readouterr().err
    assert main(["daemon", str(config), "--set", "redis.url=redis://127.0.0.1:1"]) == 2
    assert "llm.endpoints is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["run", "daemon", "worker", "status", "best", "export", "evaluate", "prune", "finetune", "speed", "zero-shot"],
)
def test_help_of_eighty_columns_cuts_nothing_off(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Options" in shown and "…" not in shown


def test_a_seed_that_torch_cannot_take_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["evaluate", "--model", "m"], ["finetune", "f", "--out", "o"], ["export", "--out", "o"]):
        assert main([*command, "--seed", str(2**63)]) == 2
        assert "is not in the range 0<=x<2**63" in capsys.readouterr().err.splitlines()[-1]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("pyproject.toml").open("rb") as file:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"selfpruner {tomllib.load(file)['project']['version']}\n"
