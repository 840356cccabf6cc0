"""How busy are the workers of a whole search, by mode, number of workers and speed of the LLM?

    python -m benchmarks.pipeline [--json FILE] [--plot FILE.png]

First, searches of a minute are measured: daemon, queue and server are real, answers and evaluations only take their
time. Each is simulated too, and the largest difference is printed. The simulation takes two figures from what is
measured: the time of daemon and queue for a candidate, from the first search, and the share of refused proposals, from
all generational searches. Larger searches are only simulated: evaluations of 7 seconds (a 7B model on an H100) and 70
seconds (70B), 1 to 64 workers, answers of 0.1 to 60 seconds. In the steady state, the number of candidates under way
is the one that the daemon chooses by itself.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.pipeline.case import Case
from benchmarks.pipeline.measure import Measured, measure
from benchmarks.pipeline.plot import plot
from benchmarks.pipeline.simulate import Simulation
from protocol.runtime import logs

MEASURED = [
    (workers, evaluation, ratio) for workers, evaluation in ((1, 0.2), (4, 0.4), (16, 1.0)) for ratio in (0.1, 1.0, 4.0)
]
"""Workers, seconds of an evaluation, and how many times as long an answer takes."""
SIMULATED = {7.0: (1, 4, 8, 64), 70.0: (1, 8, 64)}
"""Numbers of workers by the seconds of an evaluation."""
ANSWERS = (0.1, 1.0, 5.0, 15.0, 30.0, 60.0)
SIMULATIONS = 5
"""Simulations with other times, whose mean counts."""


def main() -> int:
    """Measure, simulate, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    logs.configure(level="ERROR")
    console = Console(width=120)
    found = [(case, measure(case)) for case in track(_measured_cases(), "measuring", console=console)]
    overhead, refused = _overhead(*found[0]), _refused(found)
    like_measured = partial(replace, overhead=overhead, refused=refused)
    console.print(f"daemon and queue: {1000 * overhead:.1f} ms per candidate; refused proposals: {refused:.0%}")
    measured = [
        _simulated(like_measured(case)) | {"measured": each.measuring / (case.workers * each.seconds)}
        for case, each in found
    ]
    cases = [like_measured(case) for case in _simulated_cases()]
    simulated = [row for case in cases for row in (_simulated(case), _simulated(case.in_steady_state()))]
    _print_measured(console, measured)
    _print_simulated(console, simulated)
    if given.json:
        given.json.write_text(json.dumps({"measured": measured, "simulated": simulated}, indent=1) + "\n")
    if given.plot:
        plot(simulated, given.plot)
    return 0


def _overhead(case: Case, found: Measured) -> float:
    """Return the seconds of daemon and queue for a candidate, from a search of one worker with quick answers."""
    waiting: float = found.seconds - found.measuring - _simulated(case)["idle"]
    return max(0.0, waiting / case.candidates)


def _refused(found: Sequence[tuple[Case, Measured]]) -> float:
    """Return the share of refused proposals in generational searches, where each question asks for one."""
    generational = [(case, each) for case, each in found if case.mode == "generational"]
    return 1 - sum(case.candidates for case, _ in generational) / sum(each.proposals for _, each in generational)


def _measured_cases() -> list[Case]:
    generational = [Case(workers, evaluation, evaluation * ratio) for workers, evaluation, ratio in MEASURED]
    return [case for each in generational for case in (each, each.in_steady_state())]


def _simulated_cases() -> list[Case]:
    """Return searches of 200 candidates for a few workers, and of 20 for each worker for many."""
    return [
        Case(workers, evaluation, answer, population=30, candidates=max(200, 20 * workers))
        for evaluation, numbers in SIMULATED.items()
        for workers in numbers
        for answer in ANSWERS
    ]


def _simulated(case: Case) -> dict[str, Any]:
    runs = [Simulation(case, seed) for seed in range(SIMULATIONS)]
    hours = fmean(run.seconds for run in runs) / 3600
    idle = fmean(run.seconds * case.workers - run.measuring for run in runs)
    return asdict(case) | {
        "idle": idle,
        "busy": fmean(run.busy_share for run in runs),
        "per_hour": case.candidates / hours,
    }


def _print_measured(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("workers", "evaluation", "answer", "mode", "measured", "simulated", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            str(row["workers"]), f"{row['evaluation']:.2f} s", f"{row['answer']:.2f} s", row["mode"],
            f"{row['measured']:.1%}", f"{row['busy']:.1%}",
        )  # fmt: skip
    console.print("Share of the workers' time in which they measure", style="bold")
    console.print(table)
    largest = max(abs(row["busy"] / row["measured"] - 1) for row in rows)
    console.print(f"the simulation differs from what is measured by at most {largest:.1%}\n")


def _print_simulated(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(
        "evaluation", "workers", "mode", *(f"answers of {each:g} s" for each in ANSWERS), box=None, pad_edge=False
    )
    kinds = dict.fromkeys((row["evaluation"], row["workers"], row["mode"]) for row in rows)
    for kind in kinds:
        found = [row for row in rows if (row["evaluation"], row["workers"], row["mode"]) == kind]
        cells = [f"{row['busy']:.0%} {row['per_hour']:,.0f}/h" for row in found]
        table.add_row(f"{kind[0]:g} s", str(kind[1]), kind[2], *cells)
    console.print("Simulated: busy share and candidates per hour", style="bold")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
