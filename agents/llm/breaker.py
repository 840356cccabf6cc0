"""The circuit breaker, which lets an endpoint rest and then probes it with one question, and the cooldown. Pure.

::

    closed ── too many failures in a row ─▶ open ── the rest is over, one question probes ─▶ half-open
       ▲                                      ▲                                                  │
       └────────────── any answer ────────────┴─────── no answer: a rest twice as long ──────────┘
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

Clock = Callable[[], float]
"""Returns monotonic seconds."""
BreakerState = Literal["closed", "open", "half-open"]


class Breaker:
    """Counts failures in a row, and decides whether a question may be asked. Times are in seconds on `clock`."""

    def __init__(self, failures: int, rest: float, longest_rest: float, clock: Clock = time.monotonic) -> None:
        self._failures = failures
        self._first_rest = rest
        self._longest_rest = max(rest, longest_rest)
        self._clock = clock
        self._in_a_row = 0
        self._rest = rest
        self._until = 0.0
        self.state: BreakerState = "closed"

    @property
    def rest_left(self) -> float:
        """Seconds of rest that are left."""
        return max(0.0, self._until - self._clock()) if self.state == "open" else 0.0

    @property
    def admits(self) -> bool:
        """Whether a question may be asked now: the breaker is closed, or its rest is over and the question probes."""
        return self.state == "closed" or (self.state == "open" and not self.rest_left)

    def enter(self) -> bool:
        """Begin a question that `admits` allows. Return True if it is the probe; no other question is then admitted."""
        if self.state == "closed":
            return False
        self.state = "half-open"
        return True

    def succeeded(self) -> bool:
        """Record an answer, which may be a refusal; return True if it closes the breaker."""
        closes = self.state != "closed"
        self.state = "closed"
        self._in_a_row = 0
        self._rest = self._first_rest
        return closes

    def failed(self, *, at_once: bool = False) -> bool:
        """Record a failure; return True if it opens the breaker. With `at_once`, one failure is enough."""
        if self.state == "open":  # the question was asked before the breaker opened
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
        """Record that the probe ended without a result, so that the next question is a probe."""
        if self.state == "half-open":
            self.state = "open"
            self._until = self._clock()


LONGEST = 3600.0
"""Longest wait in seconds, even if an endpoint asks for more."""
LONGEST_WORDS = 100
"""Maximum number of characters of a text that is parsed as a wait."""
SPREAD = 0.25
"""Maximum random delay after a wait, as a share of the wait, so that not all questions are sent at once."""


class Cooldown:
    """A wait that all questions to one endpoint share. Times are in seconds on `clock`."""

    def __init__(self, clock: Clock = time.monotonic, rng: random.Random | None = None) -> None:
        self._clock = clock
        self._rng = rng or random.Random()
        self._until = 0.0
        self._spread = 0.0

    @property
    def left(self) -> float:
        """Seconds of the wait that are left."""
        return max(0.0, self._until - self._clock())

    def extend(self, seconds: float) -> bool:
        """Make the wait last at least `seconds` from now. Return True if a wait begins, False if one is prolonged."""
        begins = not self.left
        if seconds > self.left:
            self._until = self._clock() + seconds
            self._spread = SPREAD * seconds
        return begins and seconds > 0

    def wait(self) -> float:
        """Return the seconds that one question waits: the time left plus a random delay, or 0 if no time is left."""
        left = self.left
        return left + self._rng.uniform(0, self._spread) if left else 0.0


def retry_after(headers: Mapping[str, str], now: datetime, body: object = None) -> float | None:
    """Return the seconds that an endpoint asks us to wait; None if it does not say.

    The value is read from the header `retry-after-ms`, else from `retry-after` (seconds or an HTTP date), else from
    `retry_after` in the body or in the body's `error`.
    """
    seconds = _from_headers(headers, now)
    if seconds is None:
        seconds = _from_body(body)
    return None if seconds is None else min(seconds, LONGEST)


def _from_headers(headers: Mapping[str, str], now: datetime) -> float | None:
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or text is None or len(text) > LONGEST_WORDS:
        return seconds
    return _seconds_until(text, now)


def _seconds_until(date: str, now: datetime) -> float | None:
    """Return the seconds from `now` to an HTTP date; None if it is no date, or out of a datetime's range."""
    try:
        moment = parsedate_to_datetime(date)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - now).total_seconds())
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _from_body(body: object) -> float | None:
    if not isinstance(body, Mapping):
        return None
    error = body.get("error")
    within = error.get("retry_after") if isinstance(error, Mapping) else None
    return _number(body.get("retry_after", within))


def _number(found: object) -> float | None:
    if not isinstance(found, str | int | float) or isinstance(found, bool):
        return None
    if isinstance(found, str) and len(found) > LONGEST_WORDS:
        return None
    try:
        value = float(found)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) and value >= 0 else None
