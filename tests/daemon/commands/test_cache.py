"""`selfpruner cache` shows what is kept and deletes it."""

from pathlib import Path

import pytest

from gpu_worker.cache import remembered
from tests.support.cli import Cli


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kind in ("features", "tokens"):
        remembered(kind, {}, lambda: 1, about="[red]m", write=_write, read=lambda _: 1)
    return tmp_path / "selfpruner"


def _write(_: int, folder: Path) -> None:
    (folder / "one").write_bytes(b"x" * 100)


def test_entries_are_shown_with_kind_model_and_size(cli: Cli, kept: Path) -> None:
    shown = cli.answer("cache")
    assert shown["folder"] == str(kept)
    assert [entry["kind"] for entry in shown["entries"]] == ["features", "tokens"]
    assert all(entry["bytes"] > 100 and entry["model"] == "[red]m" for entry in shown["entries"])
    assert "[red]m" in cli.run("cache")[1]


def test_entries_of_a_kind_can_be_deleted_alone(cli: Cli, kept: Path) -> None:
    assert cli.answer("cache", "--clear", "--kind", "tokens")["cleared"]
    assert [entry["kind"] for entry in cli.answer("cache")["entries"]] == ["features"]
    assert "0 entries" not in cli.run("cache", "--clear")[1]
    assert "0 entries kept" in cli.run("cache")[1]


def test_an_unknown_kind_is_refused(cli: Cli, kept: Path) -> None:
    assert "--kind cannot be 'x': the cache keeps calibration" in cli.error("cache", "--kind", "x")
