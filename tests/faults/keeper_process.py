"""A daemon without agents that dies at one of its durable steps: `… COUNT STEPS` issues up to COUNT candidates.

It kills itself before or after its STEPS-th script on the server (0: never), and ends with 0 when all have an outcome.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from daemon.state import store as store_module
from protocol.queue.connection import connect
from protocol.queue.keys import Keys
from protocol.queue.streams import CandidateQueue
from tests.faults.kit import Daemon, candidates

IN_FLIGHT = 3


class MortalQueue(CandidateQueue):
    """Counts the fenced steps and kills the process at one of them: an odd one before it is done, an even one after."""

    dies_at = left = 0

    async def _fenced(self, script: Callable[[], Awaitable[Any]]) -> Any:
        MortalQueue.left -= 1
        last = MortalQueue.left == 0
        if last and self.dies_at % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = await super()._fenced(script)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


async def main(count: int, steps: int) -> None:
    MortalQueue.dies_at = MortalQueue.left = steps
    setattr(store_module, "CandidateQueue", MortalQueue)  # noqa: B010  (the store makes its own queue)
    redis = connect(os.environ["SELFPRUNER_REDIS__URL"])
    daemon = Daemon(redis, Keys("faults"))
    await daemon.begin()
    for each in candidates(count):
        while len(daemon.ledger) - daemon.population.outcomes >= IN_FLIGHT:
            await asyncio.sleep(0.002)
        if each.id not in daemon.ledger:
            await daemon.issue([each])
    await daemon.settled()
    await daemon.end()
    await redis.aclose()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
