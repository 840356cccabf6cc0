"""The command line, called in this process: answers on stdout, one sentence and code 2 for what must be fixed."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.samples import SHAPE


def evaluation(target: Path, *options: object) -> list[object]:
    """Arguments that measure a pruned model."""
    texts = ["--data", target / "data.txt", "--calibration-data", target / "calibration.txt"]
    sizes = ["--windows", "3", "--calibration-windows", "4", "--seqlen", "32"]
    return ["evaluate", "--model", target / "model", *texts, *sizes, *options]


UNIFORM = ("--allocate", "uniform", "--rate", "0.3")


def test_evaluate_prints_what_uniform_pruning_costs(target: Path, cli: Cli) -> None:
    answer = cli.answer(*evaluation(target, *UNIFORM))
    assert {"perplexity", "dense_perplexity", "parameters", "seqlen", "tokens", "seconds"} <= set(answer)
    assert (answer["seqlen"], answer["tokens"]) == (32, 3 * 31)
    parameters = answer["parameters"]
    channel = 3 * 48
    assert abs(parameters["decoder_after"] - 0.7 * parameters["decoder_before"]) <= channel
    removed = parameters["decoder_before"] - parameters["decoder_after"]
    assert parameters["total_before"] - parameters["total_after"] == removed
    assert answer["perplexity"] != answer["dense_perplexity"]


def test_evaluate_takes_the_rates_of_a_file(target: Path, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": [0.0, 0.4, 0.4, 0.4]}))
    uneven = cli.answer(*evaluation(target, "--rates", file, "--rate", "0.3"))
    uniform = cli.answer(*evaluation(target, *UNIFORM))
    assert uneven["perplexity"] != uniform["perplexity"]
    assert abs(uneven["parameters"]["decoder_after"] - uniform["parameters"]["decoder_after"]) <= 2 * 3 * 48


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("owl", ["--outlier-threshold", "2"]),
        ("first-layer", []),
        ("llm-pruner", ["--first-layers", "1", "--last-layers", "0"]),
        ("sensitivity", []),
        ("rule", ["--rule", "rate - 0.1*sensitivity - 0.1*influence - 0.01*outliers"]),
    ],
)
def test_allocate_writes_a_file_that_evaluate_takes(
    target: Path, tmp_path: Path, cli: Cli, method: str, sizes: list[str]
) -> None:
    text = ["--calibration-data", target / "calibration.txt", "--calibration-windows", "4", "--seqlen", "32"]
    allocated = cli.answer("allocate", method, "--model", target / "model", "--rate", "0.3", *text, *sizes)
    (tmp_path / "rates.json").write_text(json.dumps(allocated))
    by_file = cli.answer(*evaluation(target, "--rates", tmp_path / "rates.json"))
    at_once = cli.answer(*evaluation(target, "--allocate", method, "--rate", "0.3", *sizes))
    assert by_file["perplexity"] == at_once["perplexity"]
    assert by_file["rates"] == at_once["rates"] == allocated["rates"]
    assert by_file["method"] == at_once["method"] == method


def test_a_model_can_be_measured_as_it_is(target: Path, cli: Cli) -> None:
    answer = cli.answer("evaluate", target / "model", "--data", target / "data.txt", "--seqlen", "32", "--windows", "3")
    pruned = cli.answer(*evaluation(target, *UNIFORM))
    assert answer["perplexity"] == pytest.approx(pruned["dense_perplexity"], rel=5e-3)
    assert answer["parameters"]["decoder_after"] == pruned["parameters"]["decoder_before"]


@pytest.mark.parametrize("scoring", ["dense", "sequential"])
@pytest.mark.parametrize("importance", ["wanda-sp", "taylor", "magnitude", "obs"])
def test_evaluate_scores_as_it_is_told(target: Path, cli: Cli, importance: str, scoring: str) -> None:
    code, *_ = cli.run(*evaluation(target, *UNIFORM, "--importance", importance, "--scoring", scoring))
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
def test_a_bad_rates_file_gets_one_sentence(target: Path, tmp_path: Path, cli: Cli, rates: str, sentence: str) -> None:
    file = tmp_path / "rates.json"
    file.write_text(f'{{"rates": {rates}}}')
    assert sentence in cli.error(*evaluation(target, "--rates", file, "--rate", "0.3"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--allocate", "owl", "--rates", "x.json"], "either --rates FILE or --allocate"),
        (["--allocate", "owl", "--rate", "0.3", "--importance", "taylor", "--scoring", "sequential"], "sequential"),
        (
            ["--allocate", "llm-pruner", "--rate", "0.3", "--first-layers", "3", "--last-layers", "1"],
            "no layer is left to prune",
        ),
        ([*UNIFORM, "--outlier-range", "0.1"], "--outlier-range is for the allocation owl"),
        (["--allocate", "rule", "--rate", "0.3", "--rule", "log("], "needs a number or a name before the end"),
        ([*UNIFORM, "--rule", "default"], "--rule is for the allocation rule"),
        ([*UNIFORM, "--seed", "9" * 30], "seed"),
        ([*UNIFORM, "--multiple-of", "1000"], "multiples of 1000: the narrowest MLP"),
        (["--scoring", "sequential"], "--scoring has no effect here: the model is measured unchanged"),
        (["--fitness", "kl"], "give --allocate or --rates"),
        (["--allocate", "magic", "--rate", "0.3"], "magic"),
        (["--allocate", "uniform"], "--allocate needs --rate"),
        (["--seed", "9" * 30], "seed"),
        (["--data", "~nobody-of-that-name/text.txt"], "that user has no home folder"),
        (["--allocate", "uniform", "--rate", "0.95"], "rate cannot be '0.95'"),
        (["--rates", "nowhere.json", "--rate", "0.3"], "cannot be read"),
        ([*UNIFORM, "--windows", "5000"], "too short"),
    ],
)
def test_bad_flags_of_evaluate_get_one_sentence(target: Path, cli: Cli, options: list[str], sentence: str) -> None:
    assert sentence in cli.error(*evaluation(target, *options))


def test_a_model_of_another_family_is_refused_with_the_list(target: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    told = cli.error("evaluate", "--model", tmp_path, "--data", target / "data.txt", "--seqlen", "32", *UNIFORM)
    assert "supported model types: ernie4_5, exaone4, gemma3_text" in told


@pytest.mark.parametrize("command", ["status", "best", "pause", "resume", "stop"])
def test_a_search_that_never_ran_is_named(tmp_path: Path, cli: Cli, command: str) -> None:
    told = cli.error(command, "--search", "nobody", "--folder", tmp_path)
    assert f"there is no search 'nobody' in {tmp_path}/, and no other" in told


def test_a_mistyped_search_is_told_which_there_are(tmp_path: Path, cli: Cli) -> None:
    for name in ("quickstart", "half"):
        (tmp_path / name).mkdir()
    told = cli.error("status", "--search", "qickstart", "--folder", tmp_path)
    assert f"there is no search 'qickstart' in {tmp_path}/; choose with --search: half, quickstart" in told


def test_a_search_that_is_not_running_is_told_how_to_go_on(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "quickstart").mkdir()
    told = cli.error("pause", "--search", "quickstart", "--folder", tmp_path)
    assert "the search 'quickstart'" in told and "is not running now: `selfpruner run`" in told and ".sock" not in told


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
def test_wrong_flags_are_one_sentence_and_code_2(cli: Cli, command: list[str], sentence: str) -> None:
    code, _, err = cli.run(*command)
    assert code == 2 and err.startswith(f"selfpruner: {sentence}") and err.count("\n") == 1


def test_a_rates_file_that_is_a_fifo_is_refused_at_once(tmp_path: Path, cli: Cli) -> None:
    os.mkfifo(tmp_path / "rates.json")
    command = [
        "export",
        "--model",
        "smollm2",
        "--rates",
        tmp_path / "rates.json",
        "--rate",
        "0.3",
        "--out",
        tmp_path / "o",
    ]
    assert "is not a file" in cli.error(*command)


def test_the_root_folder_is_no_place_for_an_export(cli: Cli) -> None:
    assert "name a folder in it" in cli.error("export", "--model", "smollm2", *UNIFORM, "--out", "/")


def test_a_folder_with_a_name_that_is_too_long_is_one_sentence(cli: Cli) -> None:
    assert "File name too long" in cli.error("status", "--folder", "x" * 300)


def test_without_a_command_there_is_help_and_code_2(cli: Cli) -> None:
    code, out, _ = cli.run()
    assert code == 2 and "Usage: selfpruner" in out


def test_flags_are_refused_before_torch_is_loaded() -> None:
    commands = [
        ["allocate", "uniform", "--model", "smollm2", "--rate", "2"],
        ["allocate", "--model", "smollm2", "--rate", "0.3"],
        ["allocate", "owl", "--rule", "default", "--model", "smollm2", "--rate", "0.3"],
        ["evaluate", "--model", "smollm2", "--allocate", "uniform", "--data", "self"],
        ["export", "--model", "smollm2", "--out", "here"],
        ["export", "--model", "smollm2", *UNIFORM, "--out", "."],
    ]
    code = f"import sys; from daemon.cli import main; print([main(c) for c in {commands}], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[2, 2, 2, 2, 2, 2] False\n"


def test_a_signal_ends_an_export_with_a_sentence_and_leaves_nothing(target: Path, tmp_path: Path) -> None:
    texts = ["--data", "self", "--windows", "2000", "--seqlen", "64", "--calibration-windows", "1"]
    command = [sys.executable, "-m", "daemon", "export", "--model", str(target / "model"), *texts]
    command += [*UNIFORM, "--out", str(tmp_path / "out")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if "writing text" in line:
                break
        process.send_signal(signal.SIGINT)
        *_, last = process.stderr
        assert (process.wait(), process.stdout.read()) == (128 + signal.SIGINT, "")
    assert last == "selfpruner: interrupted; nothing was written\n"
    assert not (tmp_path / "out").exists()
    assert not [path for folder in (tmp_path, tmp_path / "cache" / "selfpruner") for path in folder.glob(".*")]


@pytest.mark.usefixtures("own_cache")
def test_off_a_terminal_each_stage_is_logged(target: Path, cli: Cli) -> None:
    code, out, err = cli.run(*evaluation(target, *UNIFORM))
    lines = [json.loads(line) for line in err.splitlines()]
    stages = list(dict.fromkeys(line["stage"] for line in lines if line["event"] == "progress"))
    expected = ["loading model", "reading texts", "calibrating", "scoring", "measuring dense", "measuring pruned"]
    assert (code, stages) == (0, expected)
    assert out.splitlines()[-1].startswith("pruning and measuring took ")


def test_a_daemon_without_redis_or_endpoints_is_told_what_is_missing(tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "s.yaml"
    config.write_text("target: {model: smollm2, rate: 0.3}\n")
    assert "redis.url is missing" in cli.error("daemon", config)
    assert "llm.endpoints is missing" in cli.error("daemon", config, "--set", "redis.url=redis://127.0.0.1:1")


@pytest.mark.parametrize(
    "command",
    ["run", "daemon", "worker", "status", "best", "export", "evaluate", "prune", "finetune", "speed", "zero-shot"],
)
def test_help_of_eighty_columns_cuts_nothing_off(command: str, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, shown, _ = cli.run(command, "--help")
    assert code == 0 and "Options" in shown and "…" not in shown


@pytest.mark.parametrize(
    "command", [["evaluate", "--model", "m"], ["finetune", "f", "--out", "o"], ["export", "--out", "o"]]
)
def test_a_seed_that_torch_cannot_take_is_one_sentence(cli: Cli, command: list[str]) -> None:
    assert "is not in the range 0<=x<2**63" in cli.error(*command, "--seed", str(2**63))


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    assert cli.run("--version")[:2] == (0, f"selfpruner {version}\n")
