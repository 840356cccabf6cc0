"""Searches at several rates: one after the other, each learning from those before it, and what lies between them."""

import json
import signal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import selfpruner
from daemon.launch.front import run_front
from daemon.monitor.front import Front
from daemon.monitor.summary import Summary
from daemon.settings.settings import Settings
from daemon.settings.sources import load
from protocol.errors import SettingsError
from tests.support.cli import Cli
from tests.support.tiny_models import save_tiny_folder
from tests.support.tiny_specs import write_text

RATES = (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that needs no LLM and takes seconds."""
    folder = tmp_path_factory.mktemp("target")
    save_tiny_folder(folder / "model", hidden_size=48, layers=4)
    text = write_text(folder / "text.txt", words=1600)
    chosen = {
        "search": {
            "name": "s",
            "fitness": "kl",
            "granularity": "block",
            "seeds": ["sensitivity"],
            "initializer": "plans",
            "selector": "tournament",
            "mutator": "plans",
            "crossover": "ranked",
            "population": 4,
            "mutations": 3,
            "crossovers": 1,
            "rounds": 2,
        },
        "target": {"model": str(folder / "model"), "rate": 0.3, "dtype": "float32"},
        "data": {
            "fitness": str(text),
            "fitness_windows": 4,
            "calibration": str(text),
            "calibration_windows": 4,
            "report": str(text),
            "report_windows": 2,
            "seqlen": 16,
        },
        "worker": {"lease_seconds": 2},
    }
    file = folder / "search.json"
    file.write_text(json.dumps(chosen))
    return file


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], restored_logs: None) -> Cli:
    return Cli(capfd)


def flags(tmp_path: Path, *more: str) -> list[str]:
    chosen = [f"run.folder={tmp_path}", f"target.rates={list(RATES)}", *more]
    return [word for each in chosen for word in ("--set", each)]


def test_a_front_is_searched_shown_exported_and_resumed(config: Path, tmp_path: Path, cli: Cli) -> None:
    front = Front.model_validate(cli.answer("run", config, *flags(tmp_path)))
    assert front.finished and [point.rate for point in front.points] == list(RATES)
    # A search alone takes 12 evaluations; three of them together take one and a half times as many.
    assert [point.evaluations for point in front.points] == [6, 6, 6]
    assert all(point.best and point.ratio and point.weight_bytes == 4 * size(point.best) for point in front.points)
    learned = [json.loads(line) for line in (tmp_path / "s-0.4" / "evaluations.jsonl").read_text().splitlines()]
    assert {each["agent"] for each in learned} >= {"seed", "initializer", "mutator"}

    ElementTree.parse(tmp_path / "s" / "front.svg")
    assert json.loads((tmp_path / "s" / "front.json").read_text()) == front.model_dump(mode="json")
    code, table, _ = cli.run("run", config, *flags(tmp_path))
    assert code == 0 and "40 %" in table and "18 evaluations" in table, "ended searches are not run again"

    for rate, kept in ((0.3, front.points[1].best), (0.35, None)):
        out = tmp_path / f"small-{rate}"
        told = cli.answer("export", "--search", "s", "--rate", rate, "--folder", tmp_path, "--out", out)
        assert told["rate"] == pytest.approx(rate, abs=2e-3)
        again = cli.answer("evaluate", out, "--data", config.parent / "text.txt")
        assert again["perplexity"] == pytest.approx(told["perplexity"], rel=1e-5)
        assert kept is None or told["perplexity"] == pytest.approx(kept.perplexity, rel=1e-5)

    refused = ["export", "--search", "s", "--folder", tmp_path, "--out", tmp_path / "no", "--rate"]
    assert "--rate 0.5 is not between two of the front's rates (0.2, 0.3, 0.4)" in cli.error(*refused, 0.5)
    refused[2] = "s-0.2"
    assert "holds no searches at several rates" in cli.error(*refused, 0.3)

    assert "s has several rates: give --rate" in cli.error(*refused[:1], "--search", "s", *refused[3:-1])


def test_budgets_are_shared_if_searches_learn_from_each_other(config: Path) -> None:
    chosen = [f"target.rates={list(RATES)}", "search.max_tokens=900", "search.budget_hours=2"]
    parts = load(config, chosen, several_rates=True).of_each_rate
    assert [each.target.known_rate for each in parts] == list(RATES)
    searches = [each.search for each in parts]
    assert {(each.max_evaluations, each.max_tokens, each.budget_hours) for each in searches} == {(6, 450, 1.0)}
    assert [each.learn_from for each in searches] == [(), ("s-0.2",), ("s-0.2", "s-0.3")]
    more = load(config, [*chosen, "search.learn_from=[s-0.2, other]"], several_rates=True).of_each_rate
    assert [each.search.learn_from for each in more] == [("other",), ("s-0.2", "other"), ("s-0.2", "other", "s-0.3")]
    alone = load(config, [*chosen, "search.proposer=evolution"], several_rates=True).of_each_rate
    assert {(each.search.max_evaluations, each.search.learn_from) for each in alone} == {(12, ())}
    whole = load(config, chosen, several_rates=True).as_one_search
    assert (whole.search.planned, whole.target.known_rate, whole.target.rates) == (18, 0.2, ())


def test_a_search_in_the_way_is_found_before_anything_is_searched(config: Path, tmp_path: Path, cli: Cli) -> None:
    chosen = ["--set", f"run.folder={tmp_path}", "--set", "search.rounds=0", "--set", "target.rate=0.4"]
    assert cli.run("run", config, *chosen, "--set", "search.name=s-0.4", "--set", "search.seed=1")[0] == 0
    told = cli.error("run", config, *flags(tmp_path))
    assert "s-0.4 holds a search with other settings (seed: 1 there, 0 here): give this front another" in told
    assert not (tmp_path / "s-0.2").exists()
    assert cli.run("run", config, *chosen)[0] == 0
    told = cli.error("run", config, *flags(tmp_path, "search.seed=1"))
    assert told.endswith("s holds a search at one rate: give this front another search.name")


def size(row: Any) -> int:
    return int(row.parameters.total_after)


def test_what_a_search_cannot_learn_from_is_refused(config: Path, tmp_path: Path, cli: Cli) -> None:
    alone = ["--set", f"run.folder={tmp_path}", "--set", "search.name=first", "--set", "search.rounds=0"]
    assert cli.run("run", config, *alone)[0] == 0
    second = [*alone, "--set", "search.name=second", "--set", "target.rate=0.4", "--set"]
    assert "names other searches, each of them once" in cli.error("run", config, *second, "search.learn_from=[second]")
    assert "there is no search in the folder" in cli.error("run", config, *second, "search.learn_from=[other]")
    told = cli.error("run", config, *second, "search.learn_from=[first]", "--set", "search.seed=1")
    assert "the search first measured something else (seed: 0 there, 1 here)" in told
    assert cli.run("run", config, *second, "search.learn_from=[first]")[0] == 0


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ("target.rates=[0.3, 0.2]", r"rates must rise, without a rate twice: \[0.2, 0.3\]"),
        ("target.rates=[0.2, 0.2]", "rates must rise"),
        ("target.rates=[0.2, 30]", "it is a share: write 0.3 for 30 %"),
        ("target.rates=[0.2, 0.97]", "target.rates"),
        ("target.rates=0.2", "target.rates"),
    ],
)
def test_rates_that_make_no_front_are_refused(config: Path, tmp_path: Path, cli: Cli, chosen: str, why: str) -> None:
    import re

    assert re.search(why, cli.error("run", config, "--set", f"run.folder={tmp_path}", "--set", chosen))


def test_only_run_takes_several_rates(config: Path, tmp_path: Path, cli: Cli) -> None:
    with pytest.raises(SettingsError, match="is for `selfpruner run`"):
        selfpruner.search(config, target__rates=RATES)
    told = cli.error("prune", "smollm2", "--rate", 0.3, "--out", tmp_path / "x", "--set", f"target.rates={list(RATES)}")
    assert "target.rates is for `selfpruner run`" in told
    told = cli.error("daemon", config, *flags(tmp_path, "redis.url=redis://127.0.0.1:1"))
    assert "target.rates is for `selfpruner run`" in told


def test_a_signal_ends_the_front_and_what_is_known_stays(config: Path, tmp_path: Path) -> None:
    settings = load(config, [f"run.folder={tmp_path}", f"target.rates={list(RATES)}"], several_rates=True)
    asked: list[str] = []

    def search(each: Settings) -> tuple[Summary | None, signal.Signals | None]:
        asked.append(each.search.name)
        assert each.search.learn_from == tuple(asked[:-1])
        return None, signal.SIGTERM

    assert run_front(settings, search) == (None, signal.SIGTERM)
    assert asked == ["s-0.2"] and not (tmp_path / "s").exists()
