"""The circuit breaker, on a scripted clock."""

import pytest

from agents.llm.breaker import Breaker
from tests.support.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def closed(clock: Clock) -> Breaker:
    return Breaker(failures=3, rest=30.0, longest_rest=100.0, clock=clock)


@pytest.fixture
def opened(closed: Breaker) -> Breaker:
    assert [closed.failed() for _ in range(3)] == [False, False, True]
    return closed


def test_so_many_failures_in_a_row_open_it_and_an_answer_starts_the_count_anew(closed: Breaker) -> None:
    for failed in (True, True, False, True, True):
        assert not (closed.failed() if failed else closed.succeeded())
    assert closed.state == "closed" and closed.admits
    assert closed.failed()
    assert not closed.admits and closed.rest_left == 30


def test_it_rests_and_then_admits_one_probe(clock: Clock, opened: Breaker) -> None:
    clock.now += 29
    assert opened.rest_left == 1 and not opened.admits
    clock.now += 1
    assert opened.admits and opened.enter()
    assert opened.state == "half-open" and not opened.admits


def test_a_probe_that_succeeds_closes_it_and_the_next_rest_is_short_again(clock: Clock, opened: Breaker) -> None:
    for _ in range(2):
        clock.now += opened.rest_left
        opened.enter()
        opened.failed()
    clock.now += opened.rest_left
    opened.enter()
    assert opened.succeeded() and opened.admits and not opened.enter()
    for _ in range(3):
        opened.failed()
    assert opened.rest_left == 30


def test_each_probe_that_fails_doubles_the_rest_up_to_the_longest(clock: Clock, opened: Breaker) -> None:
    rests = []
    for _ in range(4):
        rests.append(opened.rest_left)
        clock.now += opened.rest_left
        opened.enter()
        assert opened.failed()
    assert rests == [30, 60, 100, 100]


def test_a_question_from_before_neither_prolongs_the_rest_nor_keeps_an_answer_from_closing_it(
    clock: Clock, opened: Breaker
) -> None:
    clock.now += 10
    assert not opened.failed()
    assert opened.rest_left == 20
    assert opened.succeeded()
    assert opened.state == "closed"


def test_a_probe_without_a_verdict_leaves_the_next_question_to_probe(clock: Clock, opened: Breaker) -> None:
    clock.now += 30
    opened.enter()
    opened.abandoned()
    assert opened.admits and opened.enter()
    opened.succeeded()
    opened.abandoned()
    assert opened.state == "closed"
