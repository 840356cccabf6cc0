"""The parent's handle on the evaluation process: starts the process, sends it candidates, kills its process group."""

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
from protocol.runtime.environment import THREADS, child_environment

EVALUATION_PROCESS = (sys.executable, "-m", "gpu_worker.evaluation.process")
LINE_LIMIT = 32_000_000
"""Maximum length in bytes of a line from the evaluation process. The longest line holds text that the model wrote
(protocol/queue/self_text.py)."""
LAST_LINES_SECONDS = 1.0
"""Seconds to wait for the last lines of a process that has ended. The wait needs a limit, because the process's
children may keep its stdout open."""
EXIT_STUCK = 3
"""Exit code of a worker whose evaluation process cannot be killed."""
KILL_SECONDS = 60.0
"""Seconds to wait until a killed process has ended. Freeing much memory takes a while, and a process in a stuck driver
never ends."""
Progress = Callable[[str, int, int], None]

log = structlog.get_logger()


class ChildDied(SelfPrunerError):  # noqa: N818
    """The evaluation process has ended; the message says how."""


class DeviceLost(ChildDied):
    """The evaluation process must end because its device (the CUDA context) is broken."""


class EvaluationChild:
    """One evaluation process with the model of one spec, in a process group of its own.

    `command` starts a process that uses the messages of gpu_worker/evaluation/process.py. If the model writes its own
    text, a `board` makes all workers of the search use the same text.
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
        """Return whether the process is running."""
        return self._process is not None and self._process.returncode is None

    async def start(self, progress: Progress, *, sensitivity: bool, limit_seconds: float | None = None) -> ModelProfile:
        """Start the process and wait up to `limit_seconds` for its model profile.

        Pass `sensitivity=False` when a profile is already known, so that the units' sensitivity is not measured again.
        Raises UsageError for an invalid model or data, ChildDied when the process ends or takes too long.
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
            env=THREADS | child_environment(loads_models=True),
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
        """Measure `candidate`. After the time limit, kill the process and return Failed(timeout).

        Raises DeviceLost when the device is broken, ChildDied when the process ends without an answer.
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
            raise ChildDied("the evaluation process answered for a different candidate")
        outcome = _checked(reply.get("outcome"))
        if isinstance(outcome, Failed) and outcome.reason == "crashed":
            await self.kill()
            raise DeviceLost(outcome.detail)
        return outcome

    async def kill(self) -> None:
        """Kill the process and everything in its process group.

        A process that is stuck in the GPU driver ignores signals. This process then exits too, so that the lease of its
        job expires. If it waited, it would renew the lease for ever.
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
        """Return the next message that is not a log event; write log events to this process's log."""
        while "log" in (message := await self._next_message()):
            event = message["log"]
            log.log(logging.getLevelNamesMapping()[event.pop("level").upper()], event.pop("event"), **event)
        return message

    async def _next_message(self) -> dict[str, Any]:
        assert self._process is not None
        line = await self._next_line()
        if not line.endswith(b"\n"):
            if self.alive:  # its own exit status says more than that of `kill`
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
            raise ChildDied(f"the evaluation process sent a line that is not a JSON object: {line[:100]!r}")
        return message

    async def _next_line(self) -> bytes:
        """Return the next line; an incomplete line if the process has ended or the line is too long.

        A read may not return when the process ends, because the process's children may keep its stdout open. So this
        also checks whether the process has ended.
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
    """Return the outcome that the process sent; return Failed for an invalid outcome (NaN, negative, not a number)."""
    try:
        return OUTCOME.validate_python(outcome)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        return Failed(reason="invalid", detail=f"the evaluation process sent no outcome: {place}: {problem['msg']}")
