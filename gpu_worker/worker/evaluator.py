"""The parent's handle on the evaluation process: start it, ask it, kill it with all that it started."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import structlog
from pydantic import ValidationError

from protocol.errors import SelfPrunerError, UsageError
from protocol.plans.candidate import OUTCOME, Candidate, Failed, Outcome
from protocol.plans.profile import ModelProfile
from protocol.plans.spec import SearchSpec
from protocol.queue.self_text import SelfTextBoard
from protocol.runtime.environment import for_child

EVALUATION_PROCESS = (sys.executable, "-m", "gpu_worker.evaluation.process")
LINE_LIMIT = 32_000_000
"""Bytes. The longest line is a text that the model wrote (protocol/queue/self_text.py)."""
LAST_LINES_SECONDS = 1.0
"""For the last lines of a process that has ended: what it started may hold its stdout open for ever."""
EXIT_STUCK = 3
"""How a worker ends whose evaluation process cannot be killed."""
KILL_SECONDS = 60.0
"""For a killed process to be gone: one that holds much memory takes a while, one that is stuck in a driver for ever."""
THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for each other by spinning lose most of their time where anything else uses the cores, such as a
local LLM. A variable that is set already is kept."""
Progress = Callable[[str, int, int], None]

log = structlog.get_logger()


class ChildDied(SelfPrunerError):  # noqa: N818
    """The evaluation process is gone; the text says how it ended."""


class DeviceLost(ChildDied):
    """The evaluation process has to end because its device (a CUDA context) is broken."""


class EvaluationChild:
    """One evaluation process with the model of one spec, in a process group of its own.

    `command` starts a process that speaks as gpu_worker/evaluation/process.py does. With a `board`, text that the model
    writes itself is the same for all workers of the search.
    """

    def __init__(
        self, spec: SearchSpec, command: Sequence[str] = EVALUATION_PROCESS, *, board: SelfTextBoard | None = None
    ) -> None:
        self.spec = spec
        self._command = command
        self._board = board
        self._process: asyncio.subprocess.Process | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    async def start(self, progress: Progress, *, sensitivity: bool, limit_seconds: float | None = None) -> ModelProfile:
        """Start the process and wait for its model profile, `limit_seconds` at most.

        `sensitivity` False saves the measurement of every unit when a profile is already known. Raises UsageError for
        what the user must mend (model, data), ChildDied when the process ends or takes too long.
        """
        try:
            async with asyncio.timeout(limit_seconds):
                return await self._get_ready(progress, sensitivity=sensitivity)
        except TimeoutError:
            await self.kill()
            raise ChildDied(f"the model was not ready within {limit_seconds:g} seconds") from None

    async def _get_ready(self, progress: Progress, *, sensitivity: bool) -> ModelProfile:
        text = await self._board.read() if self._board else None
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT,
            start_new_session=True,
            env=THREADS | for_child(loads_models=True),
        )
        self._send({"spec": self.spec.model_dump(mode="json"), "sensitivity": sensitivity, "self_text": text})
        while True:
            reply = await self._receive()
            if "progress" in reply:
                step = reply["progress"]
                progress(step["stage"], step["done"], step["total"])
            elif "self_text" in reply:
                text = reply["self_text"]
                self._send({"self_text": await self._board.publish(text) if self._board else text})
            elif "usage_error" in reply:
                await self.kill()
                raise UsageError(reply["usage_error"])
            elif "profile" in reply:
                return ModelProfile.model_validate(reply["profile"])

    async def evaluate(self, candidate: Candidate, *, limit_seconds: float) -> Outcome:
        """Measure `candidate`. Over the time limit the process is killed and the outcome is Failed(timeout).

        Raises DeviceLost when the process can measure nothing more, ChildDied when it ends without an answer.
        """
        self._send({"id": candidate.id, **candidate.model_dump(include={"plan", "text", "race"})})
        try:
            async with asyncio.timeout(limit_seconds):
                reply = await self._receive()
        except TimeoutError:
            await self.kill()
            return Failed(reason="timeout", detail=f"not measured within {limit_seconds:g} seconds")
        if reply.get("id") != candidate.id:
            await self.kill()
            raise ChildDied("the evaluation process answered for another candidate")
        outcome = _checked(reply.get("outcome"))
        if isinstance(outcome, Failed) and outcome.reason == "crashed":
            await self.kill()
            raise DeviceLost(outcome.detail)
        return outcome

    async def kill(self) -> None:
        """End the process and everything in its group, at once.

        Where it outlives that (stuck in the GPU's driver, it sees no signal), this process ends too: the lease of its
        job then runs out, while a worker that waited would beat for ever.
        """
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            await asyncio.wait_for(self._gone(self._process), KILL_SECONDS)
        except TimeoutError:
            log.error("evaluation_process_stuck", pid=self._process.pid, seconds=KILL_SECONDS)
            os._exit(EXIT_STUCK)

    async def _gone(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()

    @property
    def _likely_reason(self) -> str:
        killed = self._process is not None and self._process.returncode == -signal.SIGKILL
        return ": killed, as the system does when main memory runs out" if killed else ""

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _receive(self) -> dict[str, Any]:
        """The next message that is no event of the process's log."""
        while "log" in (message := await self._next_message()):
            event = message["log"]
            log.log(logging.getLevelNamesMapping()[event.pop("level").upper()], event.pop("event"), **event)
        return message

    async def _next_message(self) -> dict[str, Any]:
        assert self._process is not None
        line = await self._next_line()
        if not line.endswith(b"\n"):
            if self.alive:  # its own exit status says more than that of the kill
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), LAST_LINES_SECONDS)
            await self.kill()
            raise ChildDied(f"the evaluation process ended with status {self._process.returncode}{self._likely_reason}")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            await self.kill()
            raise ChildDied(f"the evaluation process said what is no JSON object: {line[:100]!r}")
        return message

    async def _next_line(self) -> bytes:
        """The next line; not a whole one when the process has ended or its line is too long.

        The end is looked for too: what the process started may hold its stdout open when it is gone.
        """
        assert self._process is not None and self._process.stdout is not None
        reading = asyncio.ensure_future(self._process.stdout.readline())
        try:
            while not reading.done():
                ended = not self.alive
                await asyncio.wait({reading}, timeout=LAST_LINES_SECONDS)
                if ended and not reading.done():
                    return b""
            return reading.result()
        except ValueError:  # longer than LINE_LIMIT
            return b""
        finally:
            reading.cancel()


def _checked(outcome: Any) -> Outcome:
    """The outcome as the process told it; one that is none (NaN, a negative, a word) has failed."""
    try:
        return OUTCOME.validate_python(outcome)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        return Failed(reason="invalid", detail=f"the evaluation process told no outcome: {place}: {problem['msg']}")
