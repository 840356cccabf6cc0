"""How well would the surrogate have ranked the mutations of finished searches?

    python -m benchmarks.search.replay_surrogate runs/ONE runs/OTHER

The mutations of each round are predicted from the outcomes of earlier rounds. The predicted change from the parent is
compared with the measured one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from agents.operators.surrogate import Surrogate
from agents.population.view import Member, View
from daemon.state.history import History
from daemon.state.journal import PROFILE, SPEC, saved, saved_spec
from daemon.state.recovery import recovered
from protocol.errors import UsageError
from protocol.plans.candidate import Measured
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec
from protocol.runtime.files import write_atomically

Column = NDArray[np.float64]

MIN_OUTCOMES = 12
"""Minimum number of earlier outcomes for predicting a round."""
LATE = 10
"""The second correlation is over this round and later rounds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row for each search. Return the exit code, which is 2 for a folder without a search."""
    given = _parser().parse_args(arguments)
    try:
        _replay(given.folders, given.json)
    except UsageError as error:
        print(f"replay_surrogate: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="folders of searches: spec.json, profile.json and evaluations.jsonl"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def _replay(folders: Sequence[Path], file: Path | None) -> None:
    if file and not file.parent.is_dir():
        raise UsageError(f"--json {file} cannot be written: there is no folder {str(file.parent)!r}")
    table = Table(
        "search", "mutations", "rank correlation", f"from round {LATE} on", title="predicted and measured change"
    )
    figures = {}
    for folder in folders:
        rounds, predicted, measured = replayed(folder)
        late = rounds >= LATE
        found = (rank_correlation(predicted, measured), rank_correlation(predicted[late], measured[late]))
        figures[str(folder)] = {"mutations": len(rounds), "correlation": found[0], "late": found[1]}
        table.add_row(folder.name, str(len(rounds)), *(f"{value:.2f}" for value in found))
    Console(width=120).print(table)
    if file:
        write_atomically(file, json.dumps(figures, indent=1) + "\n")


def replayed(folder: Path) -> tuple[Column, Column, Column]:
    """Return for each mutation its round, and the predicted and the measured change from its parent, in nats.

    Raise UsageError if the folder is not that of a search.
    """
    spec, profile = saved_spec(folder), _profile(folder)
    if spec is None or profile is None:
        lacks = SPEC if spec is None else PROFILE
        raise UsageError(f"{folder} is not the folder of a search: it has no {lacks}")
    members = {member.candidate.id: member for member in _members(folder, spec)}
    rows = []
    for round_ in sorted({member.candidate.provenance.round for member in members.values()}):
        before = sorted(
            (m for m in members.values() if m.candidate.provenance.round < round_), key=lambda member: member.fitness
        )
        if len(before) < MIN_OUTCOMES:
            continue
        surrogate = Surrogate(View(spec, profile, round_, (), {}, tuple(before)))
        for child in members.values():
            provenance = child.candidate.provenance
            parent = (
                members.get(provenance.parents[0]) if provenance.agent == "mutator" and provenance.parents else None
            )
            if provenance.round == round_ and parent is not None:
                change = surrogate.predict(child.candidate.plan) - surrogate.predict(parent.candidate.plan)
                rows.append((round_, change, surrogate.rise(child) - surrogate.rise(parent)))
    rounds, predicted, measured = np.array(rows, dtype=float).reshape(-1, 3).T
    return rounds, predicted, measured


def _profile(folder: Path) -> ModelProfile | None:
    record = saved(folder, PROFILE)
    try:
        return None if record is None else ModelProfile.model_validate(record)
    except ValidationError as error:
        raise UsageError(f"{folder / PROFILE} was written by another version, or is damaged") from error


def _members(folder: Path, spec: SearchSpec) -> list[Member]:
    """Return the measured candidates, without the baselines."""
    history = recovered(folder, spec, History()) or History()
    return [
        Member(evaluation.candidate, evaluation.outcome.fitness)
        for evaluation in history.population
        if evaluation.candidate.is_proposal and isinstance(evaluation.outcome, Measured)
    ]


def rank_correlation(first: Column, second: Column) -> float:
    """Return Spearman's rank correlation; NaN for fewer than three pairs."""
    if len(first) < 3:
        return float("nan")
    return float(spearmanr(first, second).statistic)


if __name__ == "__main__":
    sys.exit(main())
