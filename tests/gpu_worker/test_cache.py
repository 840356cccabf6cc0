"""The cache: computed once, verified, bounded, and never a reason to fail."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from structlog.testing import capture_logs

from gpu_worker import cache
from gpu_worker.cache import cache_dir, entries, remembered

pytestmark = pytest.mark.usefixtures("own_cache")


class Squares:
    """Something slow: how often it was computed is counted."""

    def __init__(self) -> None:
        self.computed = 0

    def __call__(self, number: int, *, size: int = 0) -> int:
        def compute() -> int:
            self.computed += 1
            return number**2

        return remembered(
            "features",
            {"number": number},
            compute,
            about="a model",
            write=_write,
            read=lambda folder: int(json.loads((folder / "it.json").read_text())),
            size=lambda _: size,
        )


def _write(found: int, folder: Path) -> None:
    (folder / "it.json").write_text(json.dumps(found))


@pytest.fixture
def square() -> Squares:
    return Squares()


def test_what_was_computed_once_is_read_from_then_on(square: Squares) -> None:
    assert [square(3), square(3), square(4), square(3)] == [9, 9, 16, 9]
    assert square.computed == 2
    assert [(entry.kind, entry.about) for entry in entries()] == [("features", "a model")] * 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("10"),
        lambda file: file.unlink(),
        lambda file: (file.parent / "entry.json").write_text("{"),
        lambda file: (file.parent / "entry.json").write_text('{"key": 1, "files": {}}'),
        lambda file: (file.parent / "entry.json").unlink(),
    ],
)
def test_a_damaged_entry_is_computed_again(square: Squares, damage: Callable[[Path], object]) -> None:
    square(3)
    (file,) = cache_dir().glob("*/it.json")
    damage(file)
    with capture_logs() as logs:
        assert (square(3), square(3)) == (9, 9)
    assert square.computed == 2
    assert [log["event"] for log in logs] == ["cache_entry_damaged", "taken_from_cache"]


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(square: Squares, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with capture_logs() as logs:
        assert (square(3), square(3)) == (9, 9)
    assert square.computed == 2 and {log["event"] for log in logs} == {"cache_not_written"}
    assert entries() == []


def test_the_least_recently_used_entries_make_room_for_new_ones(
    square: Squares, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        square(number)
    for age, entry in enumerate(entries()):
        os.utime(entry.path, (0, time.time() - 10_000 + age))
    oldest, *others = entries()
    monkeypatch.setattr(cache, "MAX_BYTES", 4 * oldest.size + 10)
    square(5, size=oldest.size)
    assert {entry.path for entry in others} < {entry.path for entry in entries()}
    assert not oldest.path.exists()


def test_an_entry_in_use_is_not_deleted_to_make_room(square: Squares, monkeypatch: pytest.MonkeyPatch) -> None:
    square(1)
    monkeypatch.setattr(cache, "MAX_BYTES", 1)
    square(2)
    assert len(entries()) == 1 and square(1) == 1 and square.computed == 2


def test_what_killed_processes_left_is_deleted_after_a_while(square: Squares) -> None:
    ages = {".features-01-unfinished": 2000, ".features-02-unfinished": 1000, ".gguf-03-x": 100_000, ".gguf-04-x": 2000}
    for name, age in ages.items():
        (cache_dir() / name).mkdir(parents=True)
        os.utime(cache_dir() / name, (0, time.time() - age))
    square(1)
    left = {path.name for path in cache_dir().iterdir() if path.name.startswith(".")}
    assert left == {".features-02-unfinished", ".gguf-04-x"}


def test_what_another_process_is_storing_is_not_stored_twice(square: Squares) -> None:
    square(3)
    (entry,) = entries()
    entry.path.rename(entry.path.with_name(f".{entry.path.name}-unfinished"))
    assert (square(3), square(3)) == (9, 9)
    assert square.computed == 3 and not entries()


def test_what_another_process_stored_meanwhile_is_left_alone(square: Squares) -> None:
    def first_by_another() -> int:
        square(3)
        return 9

    with capture_logs() as logs:
        found = remembered(
            "features", {"number": 3}, first_by_another, about="", write=_write, read=lambda _: 0, size=lambda _: 0
        )
    assert found == 9 and [entry.about for entry in entries()] == ["a model"]
    assert not logs, logs


def test_a_library_that_fails_to_write_is_no_reason_to_fail(square: Squares, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise SafetensorError("I/O error")  # no OSError

    monkeypatch.setattr("tests.gpu_worker.test_cache._write", fails)
    assert square(3) == 9 and not entries()


def test_a_user_without_a_home_has_no_cache(square: Squares, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache, "cache_dir", homeless)
    assert square(3) == 9


def test_what_is_larger_than_the_cache_may_be_is_not_kept(square: Squares) -> None:
    assert square(3, size=cache.MAX_BYTES + 1) == 9
    assert entries() == []
