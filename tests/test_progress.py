"""Which steps of a long stage the log is told, by a clock that the test turns."""

from collections.abc import Iterable

from gpu_worker.progress import LOGGED_EVERY, Sparsely


class Clock:
    """Stands still until it is turned."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def picked(steps: Iterable[tuple[str, int, int]], seconds_each: float) -> list[tuple[str, int, int]]:
    clock = Clock()
    log = Sparsely(clock)
    told = []
    for step in steps:
        if log.picks(*step):
            told.append(step)
        clock.now += seconds_each
    return told


def test_of_a_quick_stage_the_first_and_the_last_step_are_told() -> None:
    steps = [("calibrating", done, 8) for done in range(1, 9)]
    assert picked(steps, 0.1) == [steps[0], steps[-1]]


def test_a_slow_stage_is_told_of_at_most_every_ten_seconds() -> None:
    steps = [("writing text", done, 20) for done in range(1, 21)]
    assert [done for _, done, _ in picked(steps, LOGGED_EVERY / 4)] == [1, 5, 9, 13, 17, 20]


def test_no_step_is_told_twice() -> None:
    assert picked([("measuring", 8, 8)] * 3, LOGGED_EVERY) == [("measuring", 8, 8)]


def test_each_stage_begins_anew() -> None:
    steps = [("loading model", 0, 1), ("loading model", 1, 1), ("calibrating", 1, 2), ("calibrating", 2, 2)]
    assert picked(steps, 0.0) == steps
