"""A circuit breaker: whom nobody could reach is left alone for a while, then tried by one question. Pure.

::

    closed ── too many failures in a row ─▶ open ── its rest is over, one question goes ──▶ half-open
       ▲                                      ▲                                                 │
       └────────────── any answer ────────────┴─────── no answer: a rest twice as long ─────────┘
"""

import time
from collections.abc import Callable
from typing import Literal

Clock = Callable[[], float]
"""Seconds that only ever grow."""
BreakerState = Literal["closed", "open", "half-open"]


class Breaker:
    """Counts failures in a row, and says who may ask. Times in seconds on `clock`."""

    def __init__(self, *, failures: int, rest: float, longest_rest: float, clock: Clock = time.monotonic) -> None:
        self._failures = failures
        self._first_rest = rest
        self._longest_rest = max(rest, longest_rest)
        self._clock = clock
        self._in_a_row = 0
        self._rest = rest
        self._until = 0.0
        self.state: BreakerState = "closed"

    @property
    def rests(self) -> float:
        """How much longer it is left alone."""
        return max(0.0, self._until - self._clock()) if self.state == "open" else 0.0

    @property
    def admits(self) -> bool:
        """Whether a question may be asked now: when closed, and as the probe when the rest is over."""
        return self.state == "closed" or (self.state == "open" and not self.rests)

    def enter(self) -> bool:
        """Ask now, which `admits` must allow; True for the probe, while which nobody else may ask."""
        if self.state == "closed":
            return False
        self.state = "half-open"
        return True

    def succeeded(self) -> bool:
        """It answered, be it with a refusal; True when that closes the breaker."""
        closes = self.state != "closed"
        self.state = "closed"
        self._in_a_row = 0
        self._rest = self._first_rest
        return closes

    def failed(self, *, at_once: bool = False) -> bool:
        """It could not be reached, or answered nothing of use; True when that opens the breaker, or `at_once`."""
        if self.state == "open":  # a question from before
            return False
        if self.state == "half-open":
            self._rest = min(2 * self._rest, self._longest_rest)
        self._in_a_row += 1
        if self.state == "closed" and self._in_a_row < self._failures and not at_once:
            return False
        self.state = "open"
        self._until = self._clock() + self._rest
        return True

    def abandoned(self) -> None:
        """The probe was given up without a verdict: the next question is one."""
        if self.state == "half-open":
            self.state = "open"
            self._until = self._clock()
