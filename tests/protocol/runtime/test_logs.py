"""Log lines: strict JSON whatever is logged, and never a secret."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from protocol.runtime import logs
from tests.support.disks import LimitedFiles, full_at

SECRET = "hunter22"


@pytest.fixture(autouse=True)
def _restored(restored_logs: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    structlog.contextvars.clear_contextvars()


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


class Lines:
    """The lines of the file and of the readable console."""

    def __init__(self, file: Path, console: io.StringIO) -> None:
        self._file = file
        self._console = console

    @property
    def parsed(self) -> list[dict[str, Any]]:
        return [json.loads(line, parse_constant=refuse) for line in self._file.read_text("utf-8").split("\n")[:-1]]

    @property
    def text(self) -> str:
        return self._file.read_text("utf-8") + self._console.getvalue()


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lines:
    console = io.StringIO()
    monkeypatch.setattr(sys, "stderr", console)
    logs.configure(file=tmp_path / "log.jsonl", json_lines=False, secrets=[SECRET])
    return Lines(tmp_path / "log.jsonl", console)


def fails() -> None:
    local = SECRET  # noqa: F841
    raise RuntimeError(f"no access with {SECRET} to redis://user:pa55@host/0")


def test_a_secret_is_hidden_wherever_it_stands(lines: Lines) -> None:
    log = structlog.get_logger()
    log.info(f"event with {SECRET}", text=SECRET, data=SECRET.encode(), path=Path(SECRET), error=ValueError(SECRET))
    log.info("nested", deep=[{"a": ({SECRET: SECRET},)}], group={SECRET})
    logging.getLogger("library").warning("said %s", SECRET)
    assert len(lines.parsed) == 3
    assert SECRET not in lines.text


def test_a_field_with_the_name_of_a_secret_is_hidden(lines: Lines) -> None:
    structlog.get_logger().info(
        "names", api_key=["qqqq"], token="qqqq", Authorization=b"qqqq", inner={"password": "qqqq"}, prompt_tokens=5
    )
    assert "qqqq" not in lines.text
    assert lines.parsed[0]["prompt_tokens"] == 5


@pytest.mark.parametrize("url", ["redis://:pa55@host/0", "redis://user:pa55@host:1/0", "redis://user:x@pa55@host/0"])
def test_a_password_in_a_url_is_hidden(lines: Lines, url: str) -> None:
    structlog.get_logger().info("connected", url=url)
    logging.getLogger("library").error("cannot reach %s", url)
    assert "pa55" not in lines.text
    assert "host" in lines.text


def test_an_exception_shows_neither_its_locals_nor_its_secrets(lines: Lines) -> None:
    try:
        fails()
    except RuntimeError:
        structlog.get_logger().exception("failed")
        logging.getLogger("library").exception("failed")
    ours, library = lines.parsed
    assert ours["exception"][0]["exc_type"] == library["exception"][0]["exc_type"] == "RuntimeError"
    assert "RuntimeError" in lines.text
    assert SECRET not in lines.text and "pa55" not in lines.text


def test_an_error_that_nobody_catches_is_one_line_without_secrets(lines: Lines) -> None:
    try:
        fails()
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    (line,) = lines.parsed
    assert (line["event"], line["level"]) == ("crashed", "critical")
    assert line["exception"][0]["exc_type"] == "RuntimeError"
    assert SECRET not in lines.text and "pa55" not in lines.text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_service_logs_on_stderr_of_a_terminal_else_on_stdout(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    logs.configure(stream=logs.service_stream())
    structlog.get_logger().info("said")
    out, err = capsys.readouterr()
    if terminal:
        assert out == "" and "said" in err
    else:
        assert json.loads(out)["event"] == "said" and err == ""


def test_nothing_that_is_logged_breaks_a_line(lines: Lines) -> None:
    loop: list[object] = []
    loop.append(loop)
    log = structlog.get_logger()
    log.info("numbers", nan=float("nan"), deep={"inf": [float("-inf")]}, fine=0.5)
    log.info("keys", keys={(1, 2): 3, 4: float("nan")})
    log.info("text", surrogate="\ud800", newline="a\nb", separator="a\u2028b", nul="\0")
    log.info("loop", loop=loop)
    logging.getLogger("library").warning("nan %s\nnext line", float("nan"))
    assert len(lines.parsed) == 5
    assert lines.parsed[0]["nan"] == "nan"
    assert lines.parsed[0]["fine"] == 0.5
    assert "Logging error" not in lines.text


def test_context_that_is_bound_is_in_every_line(lines: Lines) -> None:
    with structlog.contextvars.bound_contextvars(search="test"):
        structlog.get_logger().info("ours")
        logging.getLogger("library").warning("theirs")
    assert [line["search"] for line in lines.parsed] == ["test", "test"]
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines.parsed)


def test_a_full_disk_is_reported_on_the_console_and_the_lost_lines_in_the_file(
    lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = io.StringIO()
    monkeypatch.setattr(sys, "stderr", console)  # pytest's own is a file too, and has no room either
    log = structlog.get_logger()
    log.info("before")
    disk = LimitedFiles(tmp_path)
    with full_at(disk, tmp_path / "log.jsonl", 20):
        for number in range(3):
            log.info("missing", number=number)
    log.info("after")
    logged = [(line["event"], line.get("lines")) for line in lines.parsed]
    assert logged == [("before", None), ("after", None), ("log_lines_missing", 4)]
    assert "Logging error" not in console.getvalue()
    told = re.findall(r"(?:info|warning|error) *\] (\w+) ", re.sub(r"\x1b\[\d*m", "", console.getvalue()))
    assert sorted(told) == sorted(["before", *["missing"] * 3, "after", "log_not_written", "log_lines_missing"])


def test_a_terminal_shows_only_what_an_event_says(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    structlog.get_logger().info("candidate_measured", says="measured 3/9: 48.90", candidate="abc", key=SECRET)
    assert lines.parsed[-1]["candidate"] == "abc"
    (shown,) = capsys.readouterr().err.splitlines()
    assert "measured 3/9: 48.90" in shown and "abc" not in shown and SECRET not in lines.text
