"""Lessons of earlier searches: read from a text file, told to the Initializer, and written at the end of a search."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from agents.initializer import Initializer
from agents.population.view import View
from agents.prompting.settings import AgentSettings, ReplyFormat
from daemon.launch.lessons import LONGEST, TOLD, add_lesson, read_lessons
from daemon.monitor.summary import Row, Summary
from daemon.settings.settings import Settings
from protocol.errors import SettingsError
from protocol.plans.plan import count_parameters, dense_plan
from tests.agents.test_agents import Desk, ScriptedChat, down
from tests.support.samples import PROFILE, SHAPE, SPEC

DATA = {"calibration": "self", "fitness": "self"}
PARAMETERS = count_parameters(dense_plan(SHAPE), SHAPE)


def row(perplexity: float, kl: float) -> Row:
    return Row(perplexity=perplexity, kl=kl, parameters=PARAMETERS, seqlen=32, tokens=100)


SUMMARY = Summary(
    search="s",
    model="tiny",
    rate=0.3,
    granularity="layer",
    fitness="kl",
    reconstruction="least-squares",
    finished=True,
    dense=row(10, 0),
    uniform=row(20, 0.5),
    best_allocation=None,
    best_rule=row(16, 0.45),
    rule="rate - 0.3*first",
    best=row(15, 0.4),
    rates=(0.0, 0.5, 0.4, 0.3),
    candidates={},
    tokens={},
    seconds=1,
)


def settings(path: Path | None) -> Settings:
    return Settings.model_validate({"target": {"model": "tiny", "rate": 0.3}, "data": DATA, "llm": {"lessons": path}})


def test_a_lesson_is_one_line_that_is_added_once(tmp_path: Path) -> None:
    path = tmp_path / "llama.md"
    assert read_lessons(settings(path)) == read_lessons(settings(None)) == ""
    for _ in range(2):
        add_lesson(path, SUMMARY, SHAPE)
    assert read_lessons(settings(path)) == (
        "- tiny without 30 % of its decoder: KL divergence 0.4000, uniform 0.5000; pruned least: layer 0 0 %, "
        "layer 3 30 %, layer 2 40 %; pruned most: layer 1 50 %, layer 2 40 %, layer 3 30 %; the best rule has 0.4500: "
        "rate - 0.3*first"
    )
    add_lesson(path, SUMMARY.model_copy(update={"fitness": "perplexity", "best_rule": None, "rule": None}), SHAPE)
    assert (
        read_lessons(settings(path)).splitlines()[1].startswith("- tiny without 30 % of its decoder: perplexity 15.00")
    )
    add_lesson(path, SUMMARY.model_copy(update={"best": None}), SHAPE)
    assert len(path.read_text().splitlines()) == 2, "a search without a best candidate teaches nothing"


def test_of_a_long_file_the_last_lines_are_told(tmp_path: Path) -> None:
    path = tmp_path / "own.md"
    path.write_bytes(b"\xff\x1b[31m old\n" + "\n".join(f"lesson {i} é" for i in range(5000)).encode())
    told = read_lessons(settings(path))
    assert len(told) <= LONGEST and told.endswith("lesson 4999 é") and told.startswith("lesson ")
    path.write_bytes(b"\x1b[31mred\x00\n")
    assert read_lessons(settings(path)) == "[31mred"


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path / "no" / "x", "folder is"),
    ):
        with pytest.raises(SettingsError, match=why):
            read_lessons(settings(path))
    add_lesson(tmp_path / "pipe", SUMMARY, SHAPE)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pipe"]


def test_a_search_and_its_replay_are_told_the_same_again(tmp_path: Path) -> None:
    lessons, first = tmp_path / "own.md", tmp_path / "runs" / "first"
    lessons.write_text("new")
    first.mkdir(parents=True)
    (first / TOLD).write_text("old")
    known = {"target": {"model": "tiny", "rate": 0.3}, "data": DATA, "run": {"folder": first.parent}}
    again = {"search": {"name": "first"}, "llm": {"lessons": lessons}}
    replay = {"search": {"name": "second"}, "llm": {"lessons": lessons, "replay": first / "transcript.jsonl"}}
    other = {"search": {"name": "third"}, "llm": {"lessons": lessons}}
    told = [read_lessons(Settings.model_validate({**known, **each})) for each in (again, replay, other)]
    assert told == ["old", "old", "new"]


def test_a_line_is_added_to_what_a_person_wrote(tmp_path: Path) -> None:
    own, link = tmp_path / "own.md", tmp_path / "link.md"
    own.write_text("my note")
    link.symlink_to(own)
    add_lesson(link, SUMMARY, SHAPE)
    assert own.read_text().startswith("my note\n- tiny") and link.is_symlink()


@pytest.mark.parametrize("reply", ["lists", "edits", "rules"])
async def test_the_initializer_tells_them(reply: ReplyFormat) -> None:
    for lessons in ("", "- prune the first layer little"):
        chat = ScriptedChat(down)
        view = replace(View(SPEC, PROFILE, 0, ()), lessons=lessons)
        await Initializer(chat, AgentSettings(reply=reply)).propose(view, 1, Desk().submit)
        told = f"What earlier searches found:\n{lessons}\n"
        assert (told in chat.conversations[0][-1]["content"]) == bool(lessons)
