"""What is answered at the same time is taken in one order, whichever answer comes first. Pure but for waiting."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager


class Turns:
    """Members take turns by step, then by number: everybody's first turn, in order, then everybody's second.

    Which candidates a round gets depends on the order in which proposals are compared with what is known. With turns it
    depends on the answers alone and not on how long each took, so a search can be replayed, and resumed amid a round.
    """

    def __init__(self, members: Iterable[int]) -> None:
        self._steps: dict[int, float] = dict.fromkeys(members, 0)
        self._calls = {member: asyncio.Event() for member in self._steps}

    @asynccontextmanager
    async def part(self, member: int) -> AsyncIterator[None]:
        """All of what a member does; nobody waits for it afterwards."""
        try:
            yield
        finally:
            del self._steps[member]
            self._call_next()

    @asynccontextmanager
    async def turn(self, member: int) -> AsyncIterator[None]:
        """Waits until it is this member's turn; the next one's begins at the end."""
        while self._next() != member:
            await self._calls[member].wait()
            self._calls[member].clear()
        yield
        self._steps[member] += 1
        self._call_next()

    @asynccontextmanager
    async def last_turn(self, member: int) -> AsyncIterator[None]:
        """Wait until every other member is done, or waits for its own last turn and has a higher number.

        How many turns a member had before its last one makes no difference to the order of the last turns.
        """
        self._steps[member] = math.inf
        self._call_next()
        async with self.turn(member):
            yield

    def _next(self) -> int:
        return min(self._steps, key=lambda member: (self._steps[member], member))

    def _call_next(self) -> None:
        if self._steps:
            self._calls[self._next()].set()
