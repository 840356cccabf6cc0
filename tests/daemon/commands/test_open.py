"""`selfpruner open`: the page of a running search in the browser, else the report; the token is in no command line."""

import webbrowser
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis import Redis

from daemon.http_api.token import PAGE_FILE, Access, kept_address, page_file
from tests.support.cli import Cli
from tests.support.samples import SPEC, put_status
from tests.support.servers import Server

pytestmark = pytest.mark.one_server
TOKEN = "token-of-some-length"
ACCESS = Access(SecretStr(TOKEN), Path("http-token"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a browser was started with."""
    found: list[str] = []

    def opens(address: str) -> bool:
        found.append(address)
        return True

    monkeypatch.setattr(webbrowser, "open", opens)
    return found


@pytest.fixture
def running(server: Server, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """The arguments that name a search whose daemon serves its page."""
    with Redis.from_url(server.url) as client:
        client.set("selfpruner:test:spec", SPEC.model_dump_json())
        client.set("selfpruner:test:daemon", "host:1:a")
    (tmp_path / "test").mkdir()
    with page_file(ACCESS, "http://0.0.0.0:8090", tmp_path / "test"):
        yield ("open", "test", "--folder", str(tmp_path), "--redis-url", server.url)


def test_the_browser_is_started_with_a_file_of_the_owner_that_leads_to_the_page(
    running: tuple[str, ...], opened: list[str], tmp_path: Path, cli: Cli
) -> None:
    assert cli.run(*running) == (0, "opened the page of test\n", "")
    file = tmp_path / "test" / PAGE_FILE
    assert opened == [file.as_uri()] and file.stat().st_mode & 0o777 == 0o600
    assert f'content="0; url=http://127.0.0.1:8090/#token={TOKEN}"' in file.read_text()


def test_without_a_browser_and_with_print_the_address_is_printed(
    running: tuple[str, ...], opened: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:8090/#token={TOKEN}\n"
    assert cli.run(*running, "--print") == (0, address, "") and not opened
    monkeypatch.setattr(webbrowser, "open", lambda _: False)
    assert cli.run(*running) == (0, address, "")


def test_a_search_without_a_page_here_is_one_sentence(
    running: tuple[str, ...], opened: list[str], tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "test" / PAGE_FILE).unlink()
    assert "serves no page from" in cli.error(*running) and not opened


def test_of_a_search_that_is_not_running_the_report_is_opened(tmp_path: Path, opened: list[str], cli: Cli) -> None:
    put_status(tmp_path / "only")
    (tmp_path / "only" / "log.jsonl").touch()
    (tmp_path / "only" / PAGE_FILE).write_text("left by a daemon that was killed")
    assert "has no report.html" in cli.error("open", "--folder", tmp_path) and not opened
    put_status(tmp_path / "only", measured=0)
    assert "has measured nothing yet" in cli.error("open", "--folder", tmp_path) and not opened
    report = tmp_path / "only" / "report.html"
    report.touch()
    assert cli.run("open", "--folder", tmp_path) == (0, f"only is not running; opened its report {report}\n", "")
    assert cli.run("open", "--folder", tmp_path, "--print") == (0, f"{report.as_uri()}\n", "")
    assert opened == [report.as_uri()]


def test_the_file_is_there_only_while_the_page_is_served_and_is_written_over_no_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / PAGE_FILE).symlink_to(tmp_path / "other")
    with page_file(ACCESS, "http://[::]:1", tmp_path):
        assert f"http://[::1]:1/#token={TOKEN}" in (tmp_path / PAGE_FILE).read_text()
        assert not (tmp_path / PAGE_FILE).is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["other"] and (tmp_path / "other").read_text() == "kept"


def test_the_file_of_a_daemon_that_was_killed_is_removed_and_that_of_another_is_left(tmp_path: Path) -> None:
    file = tmp_path / PAGE_FILE
    file.write_text("left by a daemon that was killed")
    with page_file(None, None, tmp_path):
        assert not file.exists()
    with page_file(ACCESS, "http://127.0.0.1:1", tmp_path):
        file.write_text("written by the daemon that is in charge now")
    assert file.exists() and kept_address(tmp_path) is None
    file.write_bytes(b"\xff")
    assert kept_address(tmp_path) is None


def test_a_token_from_the_settings_is_written_into_no_folder(tmp_path: Path) -> None:
    with page_file(Access(SecretStr(TOKEN)), "http://127.0.0.1:1", tmp_path):
        text = (tmp_path / PAGE_FILE).read_text()
    assert "url=http://127.0.0.1:1" in text and TOKEN not in text


def test_a_folder_that_cannot_be_written_ends_no_search(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with page_file(ACCESS, "http://127.0.0.1:1", tmp_path / "file"):
        pass
