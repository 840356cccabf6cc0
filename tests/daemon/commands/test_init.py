"""`selfpruner init` and `selfpruner config`: files of settings for a model and an LLM endpoint."""

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from daemon.commands.init import KINDS, EndpointName, settings_text
from daemon.settings.settings import setting_names
from daemon.settings.sources import load
from tests.support.cli import Cli
from tests.support.root import ROOT

EXAMPLE = "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize("endpoint", get_args(EndpointName))
def test_what_is_written_can_be_run(endpoint: EndpointName, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "my search.yaml"
    flags = ["--endpoint", endpoint, "--model", EXAMPLE, "--rate", "0.25", "--data", "c4"]
    flags += ["--base-url", "http://llm:9000/v1", "--llm-model", "mine"] * (endpoint == "other")
    code, out, err = cli.run("init", file, *flags)
    assert (code, err) == (0, "") and f"selfpruner run '{file}'" in out
    settings = load(file, [])
    assert (settings.search.name, settings.target.model, settings.target.rate) == ("my-search", EXAMPLE, 0.25)
    assert settings.data.calibration == settings.data.fitness == settings.data.report == "c4"
    assert settings.search.asks_llm == bool(settings.llm.endpoints) == (endpoint != "none")
    lines = file.read_text().splitlines()
    assert max(len(line) for line in lines if not line.startswith("#")) <= 120
    assert "exists" in cli.error("init", file), "and it is not replaced"


def test_without_flags_and_a_terminal_it_is_the_small_model(tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "a.yaml"
    assert cli.run("init", file)[0] == 0
    settings = load(file, [])
    assert (settings.target.model, settings.data.fitness, settings.llm.endpoints) == ("smollm2", "self", ())


def test_any_server_and_its_key_and_another_text_for_the_report_are_named(tmp_path: Path, cli: Cli) -> None:
    file, report, key = tmp_path / "a.yaml", tmp_path / "report.txt", tmp_path / "key"
    report.write_text("another text" * 400)
    key.write_text("sk-secret")
    flags = ("--base-url", "http://llm:9000/v1", "--llm-model", "mine", "--api-key-file", key)
    assert cli.run("init", file, *flags, "--report-data", report)[0] == 0
    settings = load(file, [])
    (endpoint,) = settings.llm.endpoints
    assert (endpoint.base_url, endpoint.model) == ("http://llm:9000/v1", "mine")
    assert endpoint.api_key_file == key
    assert (settings.data.fitness, settings.data.report) == ("self", str(report))
    assert "need --endpoint" in cli.error("init", tmp_path / "b.yaml", "--llm-model", "mine", "--endpoint", "none")


def test_a_wrong_answer_to_a_question_is_asked_for_again(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    key.write_text("sk-secret")
    answers = iter(
        ["./nowhere", "smollm2", "30", "0.25", "no.txt", "self", "gpt", "other", "", "mine", "sk-secret", str(key)]
    )
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.prompt", lambda _question, usual, **_: next(answers) or usual)
    code, _, err = cli.run("init", tmp_path / "a.yaml")
    assert code == 0 and next(answers, None) is None and "sk-secret" not in err
    for sentence in ("'./nowhere'", "0.3 for 30 %", "'no.txt'", "'gpt'", "--api-key-file: there is no such file"):
        assert sentence in err
    settings = load(tmp_path / "a.yaml", [])
    (endpoint,) = settings.llm.endpoints
    assert settings.target.rate == 0.25
    assert (endpoint.base_url, endpoint.model, endpoint.api_key_file) == (KINDS["other"].base_url, "mine", key)


def test_names_need_no_quoting(tmp_path: Path) -> None:
    odd = "it's: a #name"
    found = yaml.safe_load(settings_text("123.yaml", odd, 0.3, odd, KINDS["vllm"].at(None, odd, None), odd))
    assert found["search"]["name"] == "123"
    assert found["target"]["model"] == found["data"]["fitness"] == found["llm"]["endpoints"][0]["model"] == odd


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--rate", "30"), "write 0.3 for 30 %"),
        (("--model", "./nowhere"), "there is no folder './nowhere'"),
        (("--rate", "30%"), "it must be a number, such as 0.3"),
        (("--endpoint", "gpt"), "gpt"),
        (("--base-url", "http://llm:9000/v1"), "an endpoint of your own needs --llm-model"),
        (("--data", "SHORT"), "3,000 bytes cannot give 163,840 tokens (calibration: 128 windows of 1,024, fitness: "),
        (("--endpoint", "other"), "needs --base-url and --llm-model"),
        (("--endpoint", "openai", "--api-key-file", "sk-secret"), "--api-key-file: there is no such file"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(
    flags: tuple[str, ...], sentence: str, tmp_path: Path, cli: Cli
) -> None:
    short = tmp_path.parent / "short.txt"
    short.write_text("a" * 3000)
    found = cli.error("init", tmp_path / "a.yaml", *(str(short) if flag == "SHORT" else flag for flag in flags))
    assert sentence in found and "sk-secret" not in found
    assert "there is no folder" in cli.error("init", tmp_path / "none" / "a.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("endpoint", ["openai", "vllm", "ollama", "lm-studio"])
def test_the_file_of_each_endpoint_is_what_init_writes(endpoint: EndpointName) -> None:
    file = f"configs/{endpoint}.yaml"
    assert (ROOT / file).read_text() == settings_text(file, EXAMPLE, 0.3, "wikitext2", KINDS[endpoint], "wikitext2")


def test_the_schema_names_every_setting_and_no_other(cli: Cli) -> None:
    _, out, _ = cli.run("config", "--schema")
    schema = json.loads(out)
    sections = {name: schema["$defs"][part["$ref"].rpartition("/")[2]] for name, part in schema["properties"].items()}
    named = {f"{section}.{name}" for section, part in sections.items() for name in part["properties"]}
    assert named == {name for name in setting_names() if "[]" not in name}
    assert not any(part["additionalProperties"] for part in (schema, *sections.values()))
    rate = sections["target"]["properties"]["rate"]
    (number,) = (form for form in rate["anyOf"] if form["type"] == "number")
    assert (number["exclusiveMinimum"], number["maximum"]) == (0, 0.9) and "decoder layers" in rate["description"]


def test_settings_are_shown_without_keys(tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "a.yaml"
    cli.run("init", file, "--endpoint", "openai")
    secret = "sk-hunter22"
    _, out, _ = cli.run(
        "config", file, "--set", f"llm.endpoints=[{{base_url: http://h/v1, model: m, api_key: {secret}}}]",
        "--set", "redis.url=redis://user:hunter22@host/0",
    )  # fmt: skip
    assert "hunter22" not in out and yaml.safe_load(out)["search"]["population"] == 12
