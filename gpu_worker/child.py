"""The parent's handle on the evaluation process: start it, ask it, kill it with all that it started."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import structlog

from protocol.candidate import OUTCOME, Candidate, Failed, Measured
from protocol.card import ModelCard
from protocol.errors import SelfPrunerError, UsageError
from protocol.spec import SearchSpec

LINE_LIMIT = 4_000_000
Progress = Callable[[str, int, int], None]

log = structlog.get_logger()


class ChildDied(SelfPrunerError):  # noqa: N818
    """The evaluation process is gone; the text says how it ended."""


class EvaluationChild:
    """One evaluation process with the model of one spec, in a process group of its own."""

    def __init__(self, spec: SearchSpec) -> None:
        self._spec = spec
        self._process: asyncio.subprocess.Process | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    async def start(self, progress: Progress, *, sensitivity: bool) -> ModelCard:
        """Start the process and wait for its model card.

        `sensitivity` False saves the measurement of every unit when a card is already known. Raises UsageError for
        what the user must mend (model, data), ChildDied when the process ends.
        """
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gpu_worker.evaluation_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT,
            start_new_session=True,
        )
        self._send({"spec": self._spec.model_dump(mode="json"), "sensitivity": sensitivity})
        while True:
            reply = await self._receive()
            if "progress" in reply:
                step = reply["progress"]
                progress(step["stage"], step["done"], step["total"])
            elif "usage_error" in reply:
                await self.kill()
                raise UsageError(reply["usage_error"])
            elif "card" in reply:
                return ModelCard.model_validate(reply["card"])

    async def evaluate(self, candidate: Candidate, *, limit_seconds: float) -> Measured | Failed:
        """Measure `candidate`. Over the time limit the process is killed and the outcome is Failed(timeout)."""
        self._send({"id": candidate.id, "plan": candidate.plan.model_dump(), "text": candidate.text})
        try:
            async with asyncio.timeout(limit_seconds):
                reply = await self._receive()
        except TimeoutError:
            await self.kill()
            return Failed(reason="timeout", detail=f"not measured within {limit_seconds:g} seconds")
        if reply.get("id") != candidate.id:
            await self.kill()
            raise ChildDied("the evaluation process answered for another candidate")
        return OUTCOME.validate_python(reply["outcome"])

    async def kill(self) -> None:
        """End the process and everything in its group, at once."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

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
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            with contextlib.suppress(TimeoutError):  # its own exit status says more than that of the kill
                await asyncio.wait_for(self._process.wait(), 1)
            await self.kill()
            raise ChildDied(f"the evaluation process ended with status {self._process.returncode}{self._likely_reason}")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message
