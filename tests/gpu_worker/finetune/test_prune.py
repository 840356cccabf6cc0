"""The steps of `selfpruner prune` around its search: what is resumed, and the room that they need."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_worker.finetune.prune import check_disk
from gpu_worker.finetune.prune_records import Goal, Tuning, was_written_unrecorded
from protocol.results.finetuning import Recipe
from protocol.results.formats import Destination
from tests.support.samples import SHAPE, SPEC


@pytest.fixture
def goal(tmp_path: Path) -> Goal:
    """A model that is fine-tuned on alpaca.json, from the search `night`."""
    destination = Destination(tmp_path / "small", ("hf", "gguf"), "q8_0")
    return Goal("night", tmp_path / "runs" / "night", SPEC, destination, Tuning("a/alpaca.json", Recipe()))


def tuned(goal: Goal, *, data: str = "a/alpaca.json", minutes: float | None = None, **recipe: int) -> Goal:
    return replace(goal, tuning=Tuning(data, Recipe.model_validate(recipe), minutes))


DIFFERENT: dict[str, Callable[[Goal], Goal]] = {
    "data": lambda goal: tuned(goal, data="b/alpaca.json"),
    "minutes": lambda goal: tuned(goal, minutes=1.0),
    "micro batch": lambda goal: tuned(goal, micro_batch=1),
    "batch": lambda goal: tuned(goal, batch=2),
    "type of GGUF": lambda goal: replace(goal, destination=replace(goal.destination, gguf_type="f16")),
}


def test_only_a_call_with_the_same_flags_resumes_what_was_not_recorded(goal: Goal) -> None:
    assert goal.tuning is not None
    tuning = {"recipe": goal.tuning.recipe.model_dump(mode="json"), "data": "alpaca.json"}
    facts = {"method": "search night", "rates": [0.3], "formats": ["hf", "gguf"]}
    for folder in (goal.out, goal.search_folder):
        folder.mkdir(parents=True)
    (goal.out / "selfpruner.json").write_text(json.dumps(facts | {"finetunings": [tuning]}))
    (goal.search_folder / "best.json").write_text('{"rates": [0.3]}')
    assert not was_written_unrecorded(goal), "no call began to write it"
    (goal.search_folder / "begun.json").write_text(json.dumps(goal.flags))
    assert was_written_unrecorded(goal)
    for name, change in DIFFERENT.items():
        assert not was_written_unrecorded(change(goal)), name
    (goal.out / "selfpruner.json").write_text(json.dumps(facts | {"finetunings": [tuning | {"data": "b.json"}]}))
    assert not was_written_unrecorded(goal), "it was trained on another text"
    (goal.out / "selfpruner.json").write_text(json.dumps(facts | {"finetunings": [tuning]}))
    for damaged in ("[]", "{}", "null"):
        (goal.search_folder / "best.json").write_text(damaged)
        assert not was_written_unrecorded(goal), damaged


def test_the_disk_needs_room_for_both_models_where_they_share_it(goal: Goal, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def check(_folder: Path, needed: int, _what: str, freed: int = 0) -> None:
        asked.append(needed - freed)

    monkeypatch.setattr("gpu_worker.export.disk_space.check_disk", check)
    monkeypatch.setattr("gpu_worker.finetune.checkpoint.check_disk", check)
    goal = replace(goal, destination=Destination(Path("small"), ("hf",)))
    check_disk(goal, SHAPE)
    pruned, both = asked
    written = goal.pruned / "selfpruner.json"
    written.parent.mkdir(parents=True)
    written.touch()
    check_disk(goal, SHAPE)
    assert asked == [pruned, both, both - pruned]
    written.unlink()
    monkeypatch.setattr("gpu_worker.export.disk_space.device_of", lambda folder: folder.name == "small")
    check_disk(goal, SHAPE)
    assert asked[3:] == [pruned, both - pruned]
