"""A circuit breaker: whom nobody could reach is left alone for a while, then tried by one question. Pure.

::

    closed ── too many failures in a row ─▶ open ── its rest is over, one question goes ──▶ half-open
       ▲                                      ▲                                                 │
       └────────────── any answer ────────────┴─────── no answer: a rest twice as long ─────────┘
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
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


LONGEST = 3600.0
"""Seconds; whoever asks for more is asked again after an hour all the same."""


LONGEST_WORDS = 100
"""Characters of a wait in words; none that means anything is longer."""


SPREAD = 0.25
"""Of a wait: so much later than its end, at random, a question goes, so that not all go at once."""


class Cooldown:
    """A wait that all questions to one endpoint share. Times in seconds on `clock`."""

    def __init__(self, clock: Clock = time.monotonic, rng: random.Random | None = None) -> None:
        self._clock = clock
        self._rng = rng or random.Random()
        self._until = 0.0
        self._spread = 0.0

    @property
    def left(self) -> float:
        """How much longer nobody asks."""
        return max(0.0, self._until - self._clock())

    def extend(self, seconds: float) -> bool:
        """Nobody asks for `seconds` from now; True when that begins a wait and does not only prolong one."""
        begins = not self.left
        if seconds > self.left:
            self._until = self._clock() + seconds
            self._spread = SPREAD * seconds
        return begins and seconds > 0

    def wait(self) -> float:
        """How long one question waits: what is left, and a part of its own of the spread. Nought when nothing is."""
        left = self.left
        return left + self._rng.uniform(0, self._spread) if left else 0.0


def retry_after(headers: Mapping[str, str], now: datetime, body: object = None) -> float | None:
    """Seconds that an endpoint asks to be left alone; None where it does not say.

    `retry-after-ms`, else `retry-after` (seconds or an HTTP date), else `retry_after` in the body or in its `error`.
    """
    told = _told(headers, now)
    if told is None:
        told = _told_in(body)
    return None if told is None else min(told, LONGEST)


def _told(headers: Mapping[str, str], now: datetime) -> float | None:
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    told = headers.get("retry-after")
    seconds = _number(told)
    if seconds is not None or told is None or len(told) > LONGEST_WORDS:
        return seconds
    return _seconds_until(told, now)


def _seconds_until(date: str, now: datetime) -> float | None:
    """Seconds from `now` to an HTTP date; None where it is none, or beyond what a datetime holds."""
    try:
        moment = parsedate_to_datetime(date)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - now).total_seconds())
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _told_in(body: object) -> float | None:
    if not isinstance(body, Mapping):
        return None
    error = body.get("error")
    within = error.get("retry_after") if isinstance(error, Mapping) else None
    return _number(body.get("retry_after", within))


def _number(told: object) -> float | None:
    if not isinstance(told, str | int | float) or isinstance(told, bool):
        return None
    if isinstance(told, str) and len(told) > LONGEST_WORDS:
        return None
    try:
        value = float(told)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) and value >= 0 else None
