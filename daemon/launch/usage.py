"""What a search has used, over all its processes: the LLM's requests, tokens and money, and time."""

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from agents.llm.budget import Spent
from daemon.state.history import History
from daemon.state.store import TICK_SECONDS, SearchStore

if TYPE_CHECKING:
    from agents.llm.chat import Chat


class UsageTracker:
    """Counts, and makes durable what it counts; the `counters` may be shown meanwhile."""

    def __init__(self, store: SearchStore) -> None:
        self.counters: dict[str, float] = {}
        self._store = store
        self._asked = asyncio.Event()
        self._seconds_before = 0.0
        self.chat: Chat | None = None
        """Whose requests are counted, once there is one; time is counted before, too."""
        self._since = time.monotonic()

    def begin(self, history: History) -> None:
        """Go on from what earlier processes have used."""
        self.counters = history.counters
        self._seconds_before = history.counters.get("seconds", 0.0)

    @property
    def spent(self) -> Spent:
        """What was spent on the LLM when it was last counted."""
        return Spent(
            requests=int(self.counters.get("requests", 0)),
            prompt_tokens=int(self.counters.get("prompt_tokens", 0)),
            completion_tokens=int(self.counters.get("completion_tokens", 0)),
            cost=self.counters.get("cost", 0.0),
        )

    def seconds(self) -> float:
        """How long the search has run."""
        return self._seconds_before + time.monotonic() - self._since

    def asked(self) -> None:
        """The LLM was asked, and `save_forever` counts at once."""
        self._asked.set()

    async def save_forever(self) -> None:
        """Make durable what is spent, at once when the LLM was asked: a crash must not make a budget larger."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._asked.wait()
            self._asked.clear()
            await self.count()

    async def count(self) -> None:
        """Make durable what is used by now."""
        totals = {"seconds": self.seconds()}
        if self.chat is not None:
            spent = self.chat.spent
            totals |= {
                "requests": float(spent.requests),
                "prompt_tokens": float(spent.prompt_tokens),
                "completion_tokens": float(spent.completion_tokens),
                "cost": spent.cost,
            }
        self.counters |= totals
        await self._store.count(totals)
