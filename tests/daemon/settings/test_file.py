"""Files and variables that settings come from: whatever they are, one sentence at once, and no secret in it."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.http_api.token import open_access
from daemon.settings import file as setting_file
from daemon.settings.errors import Refused
from daemon.settings.service import HttpSettings
from daemon.settings.sources import load
from protocol.errors import SettingsError
from protocol.runtime import secret_files
from protocol.runtime.secret_files import read_secret
from tests.support.cli import Cli

GOOD = "search: {name: x}\ntarget: {model: m, rate: 0.3}\n"
SECRET = "open-sesame-5309-open"
LAUGHS = "&a0 [x]\n" + "".join(f"  - &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
MERGES = "&a0 {k: v}\n" + "".join(f"  - &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))
CONTENTS = {
    "a billion laughs": "search:\n  seeds:\n  - " + LAUGHS,
    "a billion laughs in a name": "search:\n  x:\n  - " + LAUGHS + "  name: *a11\n",
    "a billion merges": "search:\n  seeds:\n  - " + MERGES,
    "a value in itself": "search: &a {name: *a}\n",
    "100 MB": GOOD + "#" * 100_000_000,
    "deep lists": "[" * 60_000,
    "deep mappings": "{a: " * 10_000,
    "a section twice": GOOD + "target: {model: other, rate: 0.5}\n",
    "a key twice": "search: {name: x, name: y}\ntarget: {model: m, rate: 0.3}\n",
    "tabs": "search:\n\tname: x\n",
    "a NUL": GOOD + "\0",
    "bytes": os.urandom(3000),
    "Latin-1": "search: {name: é}".encode("latin-1"),
    "UTF-16": GOOD.encode("utf-16"),
    "a Python object": "search: !!python/object/apply:os.system ['touch pwned']\n",
    "another tag": "search: !mine {name: x}\n",
    "two documents": GOOD + "---\n" + GOOD,
    "a list": "- a\n",
    "a number": "42",
    "keys that are numbers": "1: 2\n",
    "keys that are numbers, in a section": "search: {1: 2}\n",
    "a key that is a list": "? [a]\n: 2\n",
    "a date that is none": "search: {name: 2026-99-99}\n",
    "a number of 5000 digits": GOOD + "data: {seqlen: " + "9" * 5000 + "}\n",
    "half of a surrogate pair": GOOD.replace("model: m", 'model: "\\ud800"'),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_settings_file_that_is_none_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, content: str | bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / "search.yaml").write_bytes(data)
    assert len(cli.error("daemon", "search.yaml")) < 400
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content", [GOOD, "\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), "search: &a {name: x}\n" + GOOD[18:]]
)
def test_a_settings_file_of_another_editor_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "search.yaml").write_bytes(content.encode())
    settings = load(tmp_path / "search.yaml")
    assert (settings.search.name, settings.target.model) == ("x", "m")


@pytest.mark.parametrize(
    "value",
    [
        *("!!int ''", "!!float ''", "!!bool maybe", "!!timestamp x", "!!binary é", "!!int x", "2026-02-31"),
        *("{[1]: 2}", "!x y", "!!omap 1", "!!pairs x", "!!set x", "!!map [1]", "{<<: 1}"),
        *(f"[!!bool {SECRET}]", f"!!float '{SECRET}'"),
    ],
)
def test_a_value_that_is_not_of_the_type_it_claims_is_refused_in_a_file_and_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("typed.yaml").write_text(f"search: {value}\n")
    Path("good.yaml").write_text(GOOD)
    for arguments in (["typed.yaml"], ["good.yaml", "--set", f"search.name={value}"]):
        told = cli.error("daemon", *arguments)
        assert len(told) < 400 and SECRET not in told


def test_aliases_and_merges_are_counted_as_what_they_stand_for() -> None:
    few = "a: &a {k: 1, l: 2}\nb: {<<: *a, l: 3}\nc: [*a, *a]\n"
    assert setting_file.parsed(few) == {"a": {"k": 1, "l": 2}, "b": {"k": 1, "l": 3}, "c": [{"k": 1, "l": 2}] * 2}
    once, often = "[&a [1, 2, 3]]", "[&a [" + "1, " * 1000 + "1]" + ", *a" * 30 + "]"
    assert setting_file.parsed(once) == [[1, 2, 3]]
    with pytest.raises(Refused, match="20,000 values"):
        setting_file.parsed(often)


def test_a_key_that_is_given_twice_is_not_shown() -> None:
    with pytest.raises(Refused, match=r"^line 2 repeats a key$"):
        setting_file.parsed(f"{SECRET}: 1\n{SECRET}: 2\n")


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/dev/urandom", "/dev/null", "pipe", "folder", "loop", "nowhere", "a" * 5000]
)
def test_a_path_that_leads_to_no_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("good.yaml").write_text(GOOD)
    assert len(cli.error("daemon", path)) < 400
    for setting in ("data.fitness", "data.calibration", "data.report"):
        code, out, err = cli.run("run", "good.yaml", "--set", f"{setting}={path}")
        assert code in (1, 2) and not out and len(err.splitlines()[-1]) < 6000 and "Traceback" not in err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LLM__ENDPOINTS", SECRET),
        ("LLM__ENDPOINTS", f'[["{SECRET}"]]'),
        ("LLM__ENDPOINTS", "[" * 100_000),
        ("LLM__ENDPOINTS", f'[{{"base_url": "{SECRET}{"x" * 100_000}"}}]'),
        ("LLM__ENDPOINTS", '[{"base_url": "http://x/v1", "model": "\\ud800"}]'),
        ("LLM__ENDPOINTS", '[{"base_url": "http://x/v1", "model": "m", "api_key": "\udcff"}]'),
        ("LLM__ENDPOINTS__0__API_KEY", SECRET),
        ("LLM", SECRET),
        ("LLM", "[1]"),
        ("REDIS__URL", f"redis://u:{SECRET}@[::1"),
        ("HTTP__TOKEN", SECRET + "\udcff"),
        ("TARGET", '{"rate": NaN}'),
        ("TARGET__RATE", "1e999"),
        ("TARGET__MODEL", "\udcff"),
        ("SEARCH", '{"name": ' + "9" * 5000 + "}"),
        ("SEARCH__NAME__X__Y", "1"),
        ("A__" * 500, "1"),
        ("", "1"),
        ("\udcff", "1"),
        ("DATA__SEQLEN", "9" * 5000),
    ],
)
def test_a_variable_that_cannot_be_is_refused_in_a_sentence_that_shows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, name: str, value: str
) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    monkeypatch.setenv(f"SELFPRUNER_{name}", value)
    said = cli.error("daemon", tmp_path / "good.yaml", "--set", f"run.folder={tmp_path}")
    assert SECRET not in said and len(said) < 4000


def a_gigabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


SECRET_FILES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a gigabyte": a_gigabyte,
    "two lines": lambda path: path.write_text(f"{SECRET}\n{SECRET}\n"),
    "a NUL": lambda path: path.write_text(f"{SECRET}\0{SECRET}"),
    "Latin-1": lambda path: path.write_bytes(SECRET.encode() + b"\xff"),
    "nothing": Path.touch,
}


@pytest.mark.parametrize("make", SECRET_FILES.values(), ids=SECRET_FILES)
def test_a_secrets_file_that_holds_none_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "secret"
    make(path)
    with pytest.raises(SettingsError) as caught:
        open_access(HttpSettings(token_file=path), tmp_path)
    assert str(path) in str(caught.value) and SECRET not in str(caught.value)
    settings = load(None, ["target.model=m", "target.rate=0.3", "redis.url=redis://h", f"redis.password_file={path}"])
    with pytest.raises(SettingsError) as caught:
        _ = settings.redis.full_url
    assert str(path) in str(caught.value) and SECRET not in str(caught.value)


def test_a_secret_may_have_the_marks_of_another_editor_and_come_out_of_a_pipe(tmp_path: Path) -> None:
    path, pipe = tmp_path / "secret", tmp_path / "pipe"
    path.write_bytes(b"\xef\xbb\xbf" + SECRET.encode() + b"\r\n")
    assert read_secret(path) == SECRET
    os.mkfifo(pipe)
    reading, writing = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), os.open(pipe, os.O_WRONLY)

    def write() -> None:
        os.write(writing, SECRET.encode())
        os.close(writing)

    timer = threading.Timer(0.2, write)
    timer.start()
    assert read_secret(pipe) == SECRET
    timer.join()
    os.close(reading)


def test_a_pipe_that_stays_silent_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_files, "WAIT_SECONDS", 0.1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    handle = os.open(pipe, os.O_RDWR)
    with pytest.raises(OSError, match="no data from it"):
        read_secret(pipe)
    os.close(handle)


def test_a_kept_token_that_is_a_pipe_is_made_anew(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "http-token")
    access = open_access(HttpSettings(), tmp_path)
    assert access.secrets == [(tmp_path / "http-token").read_text().strip()]
