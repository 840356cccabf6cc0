"""Mistakes of a first hour: one sentence that says what to do, exit code 2, and nothing left behind."""

from pathlib import Path

import pytest

from tests.support.cli import Cli

FILES = {
    "ok.yaml": "target: {model: smollm2, rate: 0.3}\nsearch: {name: mine, population: 4, rounds: 1}\n"
    "data: {calibration: self, fitness: self, fitness_windows: 2}\n",
    "empty.yaml": "",
    "broken.yaml": "a: [b\n",
    "list.yaml": "- a\n",
    "model.bin": "x",
}
ENDPOINT = "llm.endpoints=[{%s}]"
SETTINGS = [
    ("target.rate=30", "it is a share: write 0.3 for 30 %"),
    ("target.rate=0", "more than 0"),
    ("target.rate=-0.3", "more than 0"),
    ("target.rate=0.95", "less than or equal to 0.9"),
    ("target.rate=0.3333333", "at most 5 decimals"),
    ("target.rate=thirty", "target.rate cannot be 'thirty'"),
    ("target.model=", "the setting target.model has no value"),
    ("target.model=./nowhere", "there is no folder './nowhere'"),
    ("target.model=model.bin", "is a file but not a GGUF file"),
    ("target.model=/etc", "has no config.json"),
    ("target.dtype=fp16", "'bfloat16', 'float32' or 'float16'"),
    ("target.mode=smollm2", "did you mean 'target.model'?"),
    ("target.rate", "--set takes key=value"),
    ("search.population=0", "more than 0"),
    ("search.population=ten", "search.population cannot be 'ten'"),
    ("search.rounds=-1", "greater than or equal to 0"),
    ("search.max_evaluations=3", "is smaller than the first population (4): raise it"),
    ("search.seeds=[best]", "'best' is no allocation: give uniform"),
    ("search.seeds=[rule:nowhere.txt]", "there is no rule file 'nowhere.txt'"),
    ("search.name=my search", "is not allowed: use 1 to 64 letters"),
    ("search.granularity=head", "'layer' or 'block'"),
    ("search.fitness=accuracy", "'perplexity' or 'kl'"),
    ("data.fitness=nowhere.txt", "there is no text file 'nowhere.txt'"),
    ("data.calibration=wikitext", "did you mean `wikitext2`?"),
    ("data.seqlen=4", "greater than or equal to 16"),
    ("data.fitness_windows=0", "more than 0"),
    ("llm.reply=json", "'lists', 'edits', 'moves' or 'rules'"),
    (ENDPOINT % "url: 'http://127.0.0.1:8000/v1', model: m", "did you mean 'llm.endpoints.0.base_url'?"),
    (ENDPOINT % "base_url: '127.0.0.1:8000', model: m", "it is not a URL such as http://127.0.0.1:8000/v1"),
    (ENDPOINT % "base_url: 'http://127.0.0.1:8000/v1'", "the setting llm.endpoints.0.model is missing"),
    (
        ENDPOINT % "base_url: 'http://h/v1', model: m, api_key_file: nowhere",
        "key file 'nowhere' cannot be read",
    ),
    ("llm.share=30", "less than or equal to 1"),
    ("llm.lessons=nowhere/lessons.md", "its folder is missing"),
    ("llm.replay=nowhere.jsonl", "the transcript 'nowhere.jsonl' cannot be read"),
    ("http.port=70000", "less than or equal to 65535"),
]
"""Settings given to `selfpruner run ok.yaml`, and a part of the sentence."""
COMMANDS = [
    ("run nowhere.yaml", "there is no settings file 'nowhere.yaml'"),
    ("run empty.yaml", "the setting target is missing"),
    ("run broken.yaml", "invalid YAML at line 2"),
    ("run list.yaml", "is not a YAML mapping of settings"),
    ("run ok.yaml --sett a=b", "no such option: --sett"),
    ("run ok.yaml --set search.scoring=sequential --set search.importance=taylor", "needs the importance `wanda-sp`"),
    ("daemon ok.yaml", "the setting redis.url is missing"),
    ("daemon ok.yaml --set redis.url=localhost:6379", "use redis://host:port/0"),
    ("worker --redis-url http://127.0.0.1", "redis.url is not a Redis URL"),
    ("worker --idle-seconds -1", "--idle-seconds cannot be -1"),
    ("prune smollm2 --rate 30 --out small", "write 0.3 for 30 %"),
    ("prune smollm2 --rate 0.3 --out small --format onnx", "--format cannot be 'onnx'"),
    ("prune smollm2 --rate 0.3 --out small --budget 3", "is smaller than the first population (12)"),
    ("prune nowhere/at/all --rate 0.3 --out small", "there is no folder 'nowhere/at/all'"),
    ("prune smollm2 --rate 0.3", "missing option '--out'"),
    ("prune smollm2 --rate 0.3 --out ok.yaml", "--out ok.yaml is a file"),
    ("export --out small", "give --search, or --model"),
    ("export --search nowhere --out small", "there is no search 'nowhere'"),
    ("export --model smollm2 --allocate best --rate 0.3 --out small", "'best' is not one of"),
    ("evaluate nowhere", "there is no folder 'nowhere'"),
    ("evaluate smollm2 --allocate owl", "name a model with --model"),
    ("allocate --model smollm2 --rate 0.3", "give an allocation method"),
    ("finetune nowhere --out small --data ok.yaml", "there is no folder 'nowhere'"),
    ("speed nowhere --baseline smollm2", "there is no folder 'nowhere'"),
    ("zero-shot smollm2 --tasks nowhere", "there is no task 'nowhere'"),
    ("push nowhere me/small", "there is no folder 'nowhere'"),
    ("status --search nowhere", "there is no search 'nowhere'"),
    ("best --search nowhere", "there is no search 'nowhere'"),
    ("pause --search nowhere", "there is no search 'nowhere'"),
    ("check nowhere.yaml", "there is no settings file 'nowhere.yaml'"),
    ("init ok.yaml --model smollm2", "'ok.yaml' exists; name another file"),
    ("init new.yaml --rate 30", "write 0.3 for 30 %"),
    ("config", "name a file of settings, or give --schema"),
    ("cache --kind all", "--kind cannot be 'all': the cache keeps calibration"),
    ("prun smollm2", "Did you mean 'prune'"),
]
MISTAKES = [
    *((["run", "ok.yaml", "--set", given], said) for given, said in SETTINGS),
    *((command.split(), said) for command, said in COMMANDS),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=[" ".join(command) for command, _ in MISTAKES])
def test_a_mistake_is_answered_by_one_sentence_and_leaves_nothing(
    command: list[str], said: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    code, out, err = cli.run(*command)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    assert err.startswith("selfpruner: ") and said in err
    assert {path.name for path in tmp_path.iterdir()} == FILES.keys()
