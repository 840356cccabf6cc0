"""The folder's copy: what a server has lost comes back from it, and nothing in it is overwritten unread."""

import json
from pathlib import Path

import pytest

from daemon.state.history import History
from daemon.state.journal import EVALUATIONS, Journal
from daemon.state.journal import SPEC as SPEC_FILE
from daemon.state.recovery import recovered
from protocol.errors import SearchExistsError, UsageError
from protocol.plans.candidate import Failed, Outcome, Race, Stopped
from tests.support.samples import PROFILE, SPEC, candidates, measured

STOPPED = candidates(5)[4].model_copy(update={"race": Race(against=(2.0, 2.1, 2.2), first_windows=2)})
MANY = [*candidates(4), STOPPED]
OUTCOMES: list[Outcome] = [
    *(measured(9.0 - i, c, kl=0.5) for i, c in enumerate(MANY[:3])),
    Failed(reason="timeout", detail="too slow"),
    Stopped(
        perplexity=30.0,
        behind=0.4,
        windows=2,
        of_windows=3,
        parameters=measured(9.0, STOPPED).parameters,
        tokens=62,
        seconds=0.1,
    ),
]


def first(count: int) -> History:
    history = History({c.id: c for c in MANY[:count]})
    for candidate, outcome in zip(MANY[:count], OUTCOMES, strict=False):
        history.population.insert(candidate, outcome)
    return history


FULL = first(len(MANY))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a search that has measured three candidates, one in part and one in vain."""
    journal = Journal(tmp_path)
    journal.begin("test", SPEC, PROFILE, FULL.population)
    journal.transcript({"label": "one question"})
    journal.close()
    return tmp_path


@pytest.mark.parametrize("known", [0, 2])
def test_a_server_that_has_lost_all_or_some_gets_the_same_history_back(folder: Path, known: int) -> None:
    history = recovered(folder, SPEC, first(known))
    assert history is not None
    assert list(history.ledger.items()) == list(FULL.ledger.items())
    assert list(history.population) == list(FULL.population)


def test_a_server_that_has_lost_nothing_is_left_alone(folder: Path, tmp_path: Path) -> None:
    assert recovered(folder, SPEC, FULL) is None
    assert recovered(tmp_path / "new", SPEC, History()) is None


def test_what_was_spent_comes_back_too_and_never_gets_less(folder: Path) -> None:
    before = first(2)
    before.counters = {"requests": 5.0, "seconds": 8.0}
    history = recovered(folder, SPEC, before)
    assert history is not None and history.counters == {"requests": 5.0, "seconds": 8.0, "cost": 0.0}
    history = recovered(folder, SPEC, History())
    assert history is not None and history.counters["requests"] == 1.0


def test_a_line_that_a_kill_has_torn_is_passed_over(folder: Path) -> None:
    path = folder / EVALUATIONS
    path.write_bytes(path.read_bytes()[:-20])
    history = recovered(folder, SPEC, History())
    assert history is not None and [e.candidate for e in history.population] == MANY[:-1]


def test_the_copy_of_a_search_with_other_settings_is_refused(folder: Path) -> None:
    with pytest.raises(SearchExistsError, match=r"5 evaluations .*rate: 0\.3 there, 0\.5 here.*search\.name"):
        recovered(folder, SPEC.model_copy(update={"rate": 0.5}), History())


@pytest.mark.parametrize("damage", ["no JSON", "other plan", "no outcome"])
def test_a_copy_that_cannot_be_read_is_refused_only_where_it_is_needed(folder: Path, damage: str) -> None:
    path = folder / EVALUATIONS
    lines = path.read_text().splitlines()
    record = json.loads(lines[1])
    if damage == "no JSON":
        lines[1] = lines[1][:40]
    elif damage == "other plan":
        lines[1] = json.dumps({**record, "plan": json.loads(lines[2])["plan"]})
    else:
        lines[1] = json.dumps({**record, "outcome": None})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=rf"line 2 of their copy {path} cannot be read"):
        recovered(folder, SPEC, History())
    assert recovered(folder, SPEC, FULL) is None


def test_a_copy_without_its_spec_is_judged_by_the_ids_in_it(folder: Path) -> None:
    (folder / SPEC_FILE).write_text("{")
    assert recovered(folder, SPEC, History()) is not None
    with pytest.raises(UsageError, match="line 1"):
        recovered(folder, SPEC.model_copy(update={"rate": 0.5}), History())
