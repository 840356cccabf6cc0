"""Which steps of a long stage the log is told, by a clock that the test turns."""

from collections.abc import Iterable

from gpu_worker.progress import LOG_INTERVAL_SECONDS, LogThrottle
from tests.support.clock import Clock


def picked(steps: Iterable[tuple[str, int, int]], seconds_each: float) -> list[tuple[str, int, int]]:
    clock = Clock()
    log = LogThrottle(clock)
    told = []
    for step in steps:
        if log.should_log(*step):
            told.append(step)
        clock.now += seconds_each
    return told


def test_of_a_quick_stage_the_first_and_the_last_step_are_told() -> None:
    steps = [("calibrating", done, 8) for done in range(1, 9)]
    assert picked(steps, 0.1) == [steps[0], steps[-1]]


def test_a_slow_stage_is_told_of_at_most_every_ten_seconds() -> None:
    steps = [("writing text", done, 20) for done in range(1, 21)]
    assert [done for _, done, _ in picked(steps, LOG_INTERVAL_SECONDS / 4)] == [1, 5, 9, 13, 17, 20]


def test_no_step_is_told_twice() -> None:
    assert picked([("measuring", 8, 8)] * 3, LOG_INTERVAL_SECONDS) == [("measuring", 8, 8)]


def test_each_stage_begins_anew() -> None:
    steps = [("loading model", 0, 1), ("loading model", 1, 1), ("calibrating", 1, 2), ("calibrating", 2, 2)]
    assert picked(steps, 0.0) == steps


def test_the_time_left_follows_from_the_speed_of_the_stage_so_far() -> None:
    clock = Clock()
    log = LogThrottle(clock)
    log.should_log("loading model", 0, 1)
    clock.now += 1000.0
    log.should_log("writing text", 240, 10_240)  # the openings are no work of this stage
    assert log.seconds_left(240, 10_240) is None
    clock.now += 50.0
    log.should_log("writing text", 1_240, 10_240)
    assert log.seconds_left(1_240, 10_240) == 450
    clock.now += 50.0  # a step that no log is told of counts too
    assert log.seconds_left(10_240, 10_240) == 0


def test_a_stage_that_begins_again_is_timed_anew() -> None:
    clock = Clock()
    log = LogThrottle(clock)
    for done in (0, 5, 0, 5):  # the evaluation process died and was started again
        log.should_log("calibrating", done, 10)
        clock.now += 100.0
    assert log.seconds_left(5, 10) == 200
