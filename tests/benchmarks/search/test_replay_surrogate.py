"""benchmarks/search/replay_surrogate.py over the folders that searches leave."""

import json
import math
import random
from pathlib import Path

import pytest

from agents.operators.genetic import random_rates
from agents.population.population import Population
from agents.population.view import Member
from benchmarks.search import replay_surrogate
from benchmarks.search.replay_surrogate import MIN_OUTCOMES
from daemon.state.journal import Journal
from tests.agents.operators.test_moves import member, view_of
from tests.support.samples import measured

FIRST, ROUNDS, EACH = MIN_OUTCOMES, 3, 4


def _searched(folder: Path) -> None:
    """Write a random search: `FIRST` candidates, then rounds of mutations that exchange some rates of the best."""
    view, rng = view_of("layer", 0), random.Random(1)
    made: list[Member] = [member(view, random_rates(rng, len(view.units), 0.3)) for _ in range(FIRST)]
    for round_ in range(1, ROUNDS + 1):
        parent = min(made, key=lambda each: each.fitness)
        for _ in range(EACH):
            rates = list(parent.candidate.rates)
            i, j = rng.sample(range(len(rates)), 2)
            shifted = min(0.3, rates[i], 0.9 - rates[j]) * rng.random()
            rates[i], rates[j] = rates[i] - shifted, rates[j] + shifted
            made.append(member(view, rates, round_=round_, parents=(parent.candidate.id,)))
    population = Population()
    for each in made:
        population.insert(each.candidate, measured(each.fitness))
    journal = Journal(folder)
    journal.begin("test", view.spec, view.profile, population)
    journal.close()


def test_mutations_are_guessed_from_what_came_before_their_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _searched(tmp_path / "one")
    figures = tmp_path / "figures.json"
    assert replay_surrogate.main([str(tmp_path / "one"), "--json", str(figures)]) == 0
    rounds, guessed, measured_ = replay_surrogate.replayed(tmp_path / "one")
    assert sorted(rounds) == [1] * EACH + [2] * EACH + [3] * EACH
    (found,) = json.loads(figures.read_text()).values()
    assert found["mutations"] == ROUNDS * EACH and math.isnan(found["late"])
    assert found["correlation"] == replay_surrogate.rank_correlation(guessed, measured_) > 0.3
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│ one"))
    assert [cell.strip() for cell in row.split("│")[2:4]] == [str(ROUNDS * EACH), f"{found['correlation']:.2f}"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "is not the folder of a search: it has no spec.json"),
        ({"spec.json": "{}"}, "spec.json was written by another version, or is damaged"),
        ({"spec.json": "{"}, "spec.json cannot be read, or is damaged"),
        ({"spec.json": None}, "is not the folder of a search: it has no profile.json"),
        ({"spec.json": None, "profile.json": "{}"}, "profile.json was written by another version, or is damaged"),
    ],
)
def test_a_folder_without_a_search_is_a_sentence(
    tmp_path: Path, files: dict[str, str | None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(view_of("layer", 0).spec.model_dump_json() if text is None else text)
    assert replay_surrogate.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("replay_surrogate: ") and said.count("\n") == 1
