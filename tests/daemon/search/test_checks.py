"""What is checked once the model is known."""

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from daemon.search.checks import check_lists, check_lists_somewhere, is_searched_on, warn_of_texts
from daemon.settings.settings import Settings
from protocol.errors import SettingsError


def settings_with(**sections: dict[str, Any]) -> Settings:
    return Settings.model_validate({"target": {"model": "m", "rate": 0.3}, **sections})


def endpoint(context: int | None) -> dict[str, int | None]:
    return {"unknown": None, "small": context}


def test_lists_that_no_context_holds_are_refused_with_the_numbers_and_the_way_out() -> None:
    """30 shown and 10 asked for, of 60 rates: 40 x 60 x 9 tokens and the words."""
    paper = settings_with(llm={"reply": "lists"}, search={"selector": "none"})
    with pytest.raises(SettingsError, match=r"22,200 tokens for 40 lists of 60 rates.*small has 8,192: use `edits`"):
        check_lists(paper, endpoint(8192), 60)
    check_lists(paper, endpoint(32768), 60)
    check_lists(paper, endpoint(None), 60)


@pytest.mark.parametrize(
    "sections",
    [
        {"llm": {"reply": "edits"}},
        {"search": {"proposer": "random"}},
        {"search": {"population": 4, "mutations": 2, "crossovers": 2}},
        {"search": {"initializer": "random", "mutator": "ranked", "crossover": "ranked"}},
    ],
)
def test_other_questions_are_short(sections: dict[str, Any]) -> None:
    check_lists(settings_with(**sections), endpoint(4096), 60)


def test_of_what_endpoints_say_themselves_one_that_is_large_enough_or_silent_is_enough() -> None:
    paper = settings_with(llm={"reply": "lists"}, search={"selector": "none"})
    for contexts in ({"small": 8192, "large": 32768}, {"small": 8192, "silent": None}, {}):
        check_lists_somewhere(paper, contexts, 60)
    with pytest.raises(SettingsError, match="and larger has 16,384"):
        check_lists_somewhere(paper, {"small": 8192, "larger": 16384}, 60)


def test_without_feedback_only_the_answer_has_to_fit() -> None:
    best_of_n = settings_with(search={"proposer": "best-of-n", "population": 10, "mutations": 5, "crossovers": 5})
    check_lists(best_of_n, endpoint(8192), 60)
    with pytest.raises(SettingsError, match="10 lists"):
        check_lists(best_of_n, endpoint(4096), 60)
    one_by_one = settings_with(search={"proposer": "best-of-n", "population": 10}, llm={"proposals_per_call": 1})
    check_lists(one_by_one, endpoint(4096), 60)


@pytest.mark.parametrize(
    ("search", "lists"),
    [
        ({"selector": "none", "population": 12, "mutations": 10, "crossovers": 10}, 22),
        ({"selector": "none", "population": 12, "mutations": 10, "crossovers": 10, "mode": "steady-state"}, 13),
        ({"population": 100, "mutations": 60, "crossovers": 1, "initializer": "random"}, 20 + 60),
        ({"population": 30, "mutations": 1, "crossovers": 1, "seeds": ["uniform", "owl"]}, 28),
    ],
    ids=["generations", "one a turn", "no more parents than are shown", "seeds are not asked for"],
)
def test_what_is_reckoned_is_what_the_longest_question_has(search: dict[str, Any], lists: int) -> None:
    with pytest.raises(SettingsError, match=f"for {lists} lists of 60 rates"):
        check_lists(settings_with(llm={"reply": "lists"}, search=search), endpoint(1000), 60)


def test_a_link_to_the_text_that_is_searched_on_is_that_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").write_text("words")
    (tmp_path / "link.txt").symlink_to("a.txt")
    a, b, link = (str(tmp_path / name) for name in ("a.txt", "b.txt", "link.txt"))
    assert is_searched_on(link, a) and not is_searched_on(b, a)


def test_reporting_on_the_text_that_is_searched_on_is_said_once() -> None:
    with capture_logs() as logs:
        warn_of_texts(settings_with(data={"fitness": "a.txt", "report": "a.txt"}))
        warn_of_texts(settings_with(data={"fitness": "a.txt", "report": "./a.txt"}))
        warn_of_texts(settings_with(data={"fitness": "a.txt", "report": "b.txt"}))
        warn_of_texts(settings_with(data={"fitness": "self", "report": "self"}))
    assert [(line["event"], line["text"]) for line in logs] == [
        ("report_is_searched_on", "a.txt"),
        ("report_is_searched_on", "./a.txt"),
    ]
