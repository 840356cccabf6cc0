"""Resources used by a search, summed over restarts: LLM requests, tokens, cost and time."""

import asyncio
import contextlib
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from agents.llm.policy import Spent
from daemon.state.history import History
from daemon.state.store import TICK_SECONDS, SearchStore

if TYPE_CHECKING:
    from agents.llm.chat import Chat


class UsageTracker:
    """Counts what a search uses, and saves the `counters` in Redis."""

    def __init__(self, store: SearchStore) -> None:
        self.counters: dict[str, float] = {}
        self._store = store
        self._asked = asyncio.Event()
        self._seconds_before = 0.0
        self.chat: Chat | None = None
        """The chat whose requests are counted; None until it is made. Time is counted from the start."""
        self._since = time.monotonic()

    def begin(self, history: History) -> None:
        """Continue from the usage of earlier processes."""
        self.counters = history.counters
        self._seconds_before = history.counters.get("seconds", 0.0)

    @property
    def spent(self) -> Spent:
        """LLM requests, tokens and cost at the last save."""
        return Spent(
            requests=int(self.counters.get("requests", 0)),
            prompt_tokens=int(self.counters.get("prompt_tokens", 0)),
            completion_tokens=int(self.counters.get("completion_tokens", 0)),
            cost=self.counters.get("cost", 0.0),
        )

    def seconds(self) -> float:
        """Return how long the search has run."""
        return self._seconds_before + time.monotonic() - self._since

    def request_made(self) -> None:
        """Make `save_forever` save at once. Call it after each request to the LLM."""
        self._asked.set()

    async def save_forever(self) -> None:
        """Save every TICK_SECONDS, and at once after a request, because a crash must not enlarge a budget."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._asked.wait()
            self._asked.clear()
            await self.save()

    async def save(self) -> None:
        """Save the current usage in Redis."""
        totals = {"seconds": self.seconds()}
        if self.chat is not None:
            totals |= {name: float(total) for name, total in asdict(self.chat.spent).items()}
        self.counters |= totals
        await self._store.count(totals)
