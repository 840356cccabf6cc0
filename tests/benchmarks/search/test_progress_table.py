"""The table that compares methods seed by seed (benchmarks/search/table.py)."""

from typing import Any

import pytest

from benchmarks.search.table import show_progress, sign_flip_p


def result(method: str, seed: int, *best: float) -> dict[str, Any]:
    """A search of ten evaluations whose best values come after the first, the fourth and the tenth."""
    so_far = {"evaluations": [1, 4, 10][: len(best)], "fitness": list(best)}
    figures = {"uniform": 2.0, "report": 3.0, "uniform_report": 4.0}
    return {"method": method, "seed": seed, "budget": 10, "best_so_far": so_far, **figures}


def test_methods_are_compared_with_the_strongest_one_without_an_llm(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        *(result("random", seed, 1.9) for seed in range(3)),
        *(result("plans", seed, 1.8, 1.6) for seed in range(3)),
        *(result("llm", seed, 1.8, 1.5 if seed else 1.7, 1.4) for seed in range(3)),
    ]
    show_progress(results, 0.3, ("random", "plans"))
    shown = capsys.readouterr().out
    lines = [line.split("│") for line in shown.splitlines() if line.startswith("│")]
    cells = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines}
    assert cells["plans"] == ["0.900", "0.800", "0.800", "0.800", "0.750", "", ""]
    assert cells["llm"] == ["0.900", "0.750", "0.750", "0.700", "0.750", "2 of 3, p 0.50", "3 of 3, p 0.25"]
    assert shown.count("plans after 4") == shown.count("plans after 10") == 1


def test_p_is_the_share_of_sign_flips_that_are_as_extreme() -> None:
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4, 0.5]) == 2 / 32
    assert sign_flip_p([0.1, -0.1]) == 1


def test_a_seed_without_any_outcome_so_far_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    late = result("llm", 0, 1.8) | {"best_so_far": {"evaluations": [9], "fitness": [1.2]}}
    show_progress([late, result("llm", 1, 1.4), result("plans", 0, 1.8), result("plans", 1, 1.8)], 0.3, ("plans",))
    shown = capsys.readouterr().out
    assert "1 of 1, p 1.00" in shown and "2 of 2, p 0.50" in shown and "never" in shown
