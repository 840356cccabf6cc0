"""How well would the surrogate have ranked the mutations of searches that are over?

    python -m benchmarks.replay_surrogate runs/ONE runs/OTHER

Each round's mutations are guessed from what was measured before that round; the guessed change from the parent is
compared with the measured one.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from agents.view import Member, View
from daemon.journal import CARD, SPEC
from daemon.recovery import recovered
from daemon.store import History
from protocol.candidate import Measured
from protocol.card import ModelCard
from protocol.spec import SearchSpec

Column = NDArray[np.float64]

LEAST = 12
"""Outcomes before a round is guessed."""
LATE = 10
"""The round from which on the second figure looks."""


def main() -> None:
    """A row for each search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", type=Path, nargs="+", help="folders of searches: spec.json, card.json and evaluations.jsonl"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args()
    table = Table(
        "search", "mutations", "rank correlation", f"from round {LATE} on", title="guessed and measured change"
    )
    figures = {}
    for folder in given.folders:
        rounds, guessed, measured = replayed(folder)
        late = rounds >= LATE
        found = (rank_correlation(guessed, measured), rank_correlation(guessed[late], measured[late]))
        figures[str(folder)] = {"mutations": len(rounds), "correlation": found[0], "late": found[1]}
        table.add_row(folder.name, str(len(rounds)), *(f"{value:.2f}" for value in found))
    Console(width=120).print(table)
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


def replayed(folder: Path) -> tuple[Column, Column, Column]:
    """Of each mutation its round, and the guessed and the measured change from its parent, in nats."""
    record = json.loads((folder / SPEC).read_text())
    spec = SearchSpec.model_validate({name: record[name] for name in SearchSpec.model_fields})
    card = ModelCard.model_validate_json((folder / CARD).read_text())
    members = {member.candidate.id: member for member in _members(folder, spec)}
    rows = []
    for round_ in sorted({member.candidate.provenance.round for member in members.values()}):
        before = sorted(
            (m for m in members.values() if m.candidate.provenance.round < round_), key=lambda member: member.fitness
        )
        if len(before) < LEAST:
            continue
        surrogate = View(spec, card, round_, (), {}, tuple(before)).surrogate
        for child in members.values():
            who = child.candidate.provenance
            parent = members.get(who.parents[0]) if who.agent == "mutator" and who.parents else None
            if who.round == round_ and parent is not None:
                guess = surrogate.guess(child.candidate.plan) - surrogate.guess(parent.candidate.plan)
                rows.append((round_, guess, surrogate.rise(child) - surrogate.rise(parent)))
    rounds, guessed, measured = np.array(rows, dtype=float).reshape(-1, 3).T
    return rounds, guessed, measured


def _members(folder: Path, spec: SearchSpec) -> list[Member]:
    """What was measured, but for the baselines."""
    history = recovered(folder, spec, History()) or History()
    members = []
    for candidate in history.ledger.values():
        outcome = history.outcomes[candidate.id]
        if candidate.provenance.agent != "baseline" and isinstance(outcome, Measured):
            members.append(Member(candidate, outcome.fitness))
    return members


def rank_correlation(first: Column, second: Column) -> float:
    """Spearman's; no number of fewer than three."""
    if len(first) < 3:
        return float("nan")
    return float(spearmanr(first, second).statistic)


if __name__ == "__main__":
    main()
