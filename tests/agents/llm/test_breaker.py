"""The circuit breaker, on a scripted clock."""

from agents.llm.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def breaker(clock: Clock) -> Breaker:
    return Breaker(failures=3, rest=30.0, longest_rest=100.0, clock=clock)


def opened(clock: Clock) -> Breaker:
    it = breaker(clock)
    assert [it.failed() for _ in range(3)] == [False, False, True]
    return it


def test_so_many_failures_in_a_row_open_it_and_an_answer_starts_the_count_anew() -> None:
    it = breaker(Clock())
    for failed in (True, True, False, True, True):
        assert not (it.failed() if failed else it.succeeded())
    assert it.state == "closed" and it.admits
    assert it.failed()
    assert not it.admits and it.rest_left == 30


def test_it_rests_and_then_admits_one_probe() -> None:
    clock = Clock()
    it = opened(clock)
    clock.now += 29
    assert it.rest_left == 1 and not it.admits
    clock.now += 1
    assert it.admits and it.enter()
    assert it.state == "half-open" and not it.admits


def test_a_probe_that_succeeds_closes_it_and_the_next_rest_is_short_again() -> None:
    clock = Clock()
    it = opened(clock)
    for _ in range(2):
        clock.now += it.rest_left
        it.enter()
        it.failed()
    clock.now += it.rest_left
    it.enter()
    assert it.succeeded() and it.admits and not it.enter()
    for _ in range(3):
        it.failed()
    assert it.rest_left == 30


def test_each_probe_that_fails_doubles_the_rest_up_to_the_longest() -> None:
    clock = Clock()
    it = opened(clock)
    rests = []
    for _ in range(4):
        rests.append(it.rest_left)
        clock.now += it.rest_left
        it.enter()
        assert it.failed()
    assert rests == [30, 60, 100, 100]


def test_a_question_from_before_neither_prolongs_the_rest_nor_keeps_an_answer_from_closing_it() -> None:
    clock = Clock()
    it = opened(clock)
    clock.now += 10
    assert not it.failed()
    assert it.rest_left == 20
    assert it.succeeded()
    assert it.state == "closed"


def test_a_probe_without_a_verdict_leaves_the_next_question_to_probe() -> None:
    clock = Clock()
    it = opened(clock)
    clock.now += 30
    it.enter()
    it.abandoned()
    assert it.admits and it.enter()
    it.succeeded()
    it.abandoned()
    assert it.state == "closed"
