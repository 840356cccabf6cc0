import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from gpu_worker.export.folder import ExportError, check_target, write_folder
from protocol.results.formats import FACTS
from tests.support.root import ROOT


def write_one(folder: Path) -> None:
    (folder / FACTS).write_text("new")


def older_export(folder: Path) -> Path:
    folder.mkdir()
    (folder / FACTS).write_text("old")
    (folder / "model.safetensors").write_text("old")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_folder_is_not_there_before_it_is_complete(tmp_path: Path) -> None:
    def look(folder: Path) -> None:
        write_one(folder)
        assert not (tmp_path / "out").exists()
        assert folder.parent.name.startswith(".out.") and folder.parent.parent == tmp_path

    write_folder(tmp_path / "out", look, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("problem", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_what_stops_half_way_leaves_nothing(tmp_path: Path, problem: BaseException) -> None:
    def stop(folder: Path) -> None:
        write_one(folder)
        raise problem

    with pytest.raises(type(problem)):
        write_folder(tmp_path / "out", stop, force=False)
    assert not list(tmp_path.iterdir())


FULL = "No space left on device"


@pytest.mark.parametrize("problem", [OSError(28, FULL), SafetensorError(FULL)])
def test_a_full_disk_is_one_sentence(tmp_path: Path, problem: Exception) -> None:
    def fill(folder: Path) -> None:
        raise problem

    with pytest.raises(ExportError, match=r"the folder .*/out cannot be written \(No space left on device\)"):
        write_folder(tmp_path / "out", fill, force=False)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    older = older_export(tmp_path / "out")
    check_target(older, force=True)
    for act in (check_target, lambda target, force: write_folder(target, write_one, force=force)):
        with pytest.raises(ExportError, match="out exists; pass another one, or --force to replace it"):
            act(older, force=False)
    assert contents(tmp_path / "out") == {FACTS: "old", "model.safetensors": "old"}


def test_force_keeps_the_older_export_until_the_new_one_is_complete(tmp_path: Path) -> None:
    older = older_export(tmp_path / "out")

    def look(folder: Path) -> None:
        assert contents(older)[FACTS] == "old"
        raise OSError(28, "No space left on device")

    with pytest.raises(ExportError):
        write_folder(older, look, force=True)
    assert contents(older) == {FACTS: "old", "model.safetensors": "old"}
    write_folder(older, write_one, force=True)
    assert contents(older) == {FACTS: "new"} and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_export_is_never_replaced_nor_is_that_advised(tmp_path: Path, force: bool) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ExportError, match=r"thesis exists and is not an export of Self-Pruner; pass another name$"):
        write_folder(tmp_path / "thesis", write_one, force=force)
    assert contents(tmp_path / "thesis") == {"chapter.tex": "years of work"}


def test_a_signal_between_two_renamings_brings_the_older_export_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, rename = older_export(tmp_path / "out"), Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.parent.name.startswith(".") and (path / FACTS).read_text() == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(older, write_one, force=True)
    assert contents(older)[FACTS] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_missing_parents_are_made(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "a" / "b" / "out"
    write_folder(out, write_one, force=force)
    assert contents(out) == {FACTS: "new"}


def test_force_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", write_one, force=True)
    assert contents(tmp_path / "empty") == {FACTS: "new"}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_its_place_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ExportError, match="out is a file; pass a folder"):
        write_folder(tmp_path / "out", write_one, force=force)
    with pytest.raises(ExportError, match=r"/out/below cannot be written \(Not a directory\)"):
        check_target(tmp_path / "out" / "below", force=force)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_may_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ExportError, match=r"cannot be written \(Permission denied\)"):
            check_target(tmp_path / "a" / "out", force=False)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("force", [False, True])
def test_a_parent_without_room_for_the_hidden_folder_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    older_export(tmp_path / "out")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    with pytest.raises(ExportError, match=r"/out cannot be written \(Permission denied\)"):
        check_target(tmp_path / "out", force=force)


def test_a_mount_point_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older_export(tmp_path / "out")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "out")
    with pytest.raises(ExportError, match="out is a mount point, which cannot be replaced; pass a folder in it"):
        check_target(tmp_path / "out", force=True)


def test_others_may_read_the_files_who_may_read_the_folder(tmp_path: Path) -> None:
    def write_private(folder: Path) -> None:
        write_one(folder)
        (folder / FACTS).chmod(0o600)

    write_folder(tmp_path / "out", write_private, force=False)
    mode = stat.S_IMODE((tmp_path / "out").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "out" / FACTS).stat().st_mode) == mode & 0o666


@pytest.fixture
def writer(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that is half-way through writing `out`."""
    code = (
        "import sys, time; from pathlib import Path; from gpu_worker.export.folder import write_folder\n"
        "def write(folder):\n"
        "    (folder / 'model.safetensors').write_text('half'); print('half', flush=True); time.sleep(600)\n"
        "write_folder(Path(sys.argv[1]), write, force=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        yield process
        process.kill()


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path, writer: "subprocess.Popen[str]") -> None:
    for act in (check_target, lambda target, force: write_folder(target, write_one, force=force)):
        with pytest.raises(ExportError, match=r"the folder .*/out is being written by another process$"):
            act(tmp_path / "out", force=True)
    assert writer.poll() is None
    (unfinished,) = tmp_path.iterdir()
    assert contents(unfinished / "content") == {"model.safetensors": "half"}


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path, writer: "subprocess.Popen[str]") -> None:
    writer.kill()
    writer.wait()
    assert [path.name[:5] for path in tmp_path.iterdir()] == [".out."]
    check_target(tmp_path / "out", force=False)
    assert not list(tmp_path.iterdir()), "the disk that it took is free before anything begins"
    write_folder(tmp_path / "out", write_one, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(tmp_path / "out") == {FACTS: "new"}


def killed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renaming: int) -> None:
    """Leave what a kill leaves after so many renamings; no handler runs then."""
    left, rename = renaming, Path.rename

    def until(path: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "rename", until)
        patched.setattr("gpu_worker.export.folder._clear", lambda _: None)
        write_folder(tmp_path / "out", write_one, force=True)


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_an_older_export_that_a_killed_process_moved_aside_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older_export(tmp_path / "out")
    killed_at(tmp_path, monkeypatch, 1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExportError, match="out exists; pass another one, or --force to replace it"):
        check_target(tmp_path / "out", force=False)
    assert contents(tmp_path / "out")[FACTS] == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_older_export_whose_place_is_taken_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older_export(tmp_path / "out")
    killed_at(tmp_path, monkeypatch, 2)
    assert contents(tmp_path / "out") == {FACTS: "new"} and len(list(tmp_path.iterdir())) > 1
    check_target(tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == {FACTS: "new"} and [path.name for path in tmp_path.iterdir()] == ["out"]
