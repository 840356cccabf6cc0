"""Answers from a transcript: a whole search without an endpoint, or what a killed process had been answered already."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from agents.llm.endpoint import Answer, Asks, Message
from protocol.errors import EndpointError, SettingsError

log = structlog.get_logger()


@dataclass(frozen=True)
class Unanswered:
    """A question that no endpoint answered, and why."""

    reason: str


class Transcript:
    """What came of each question, found by its label (agent, round, call, attempt) and its messages.

    Of a question that was asked again after a restart, what came last counts.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._found: dict[str, Answer | Unanswered] = {}
        for record in records:
            self.add(record)

    def __len__(self) -> int:
        return len(self._found)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one record of a transcript; one that is none is passed over."""
        try:
            key = _key(record["label"], record["messages"])
            came = _came(record)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            return
        if isinstance(came, Answer) or record["endpoint"] is None:
            self._found[key] = came
        else:  # one endpoint failed; what all of them did comes behind
            self._found.setdefault(key, came)

    def find(self, label: str, messages: Sequence[Message]) -> Answer | Unanswered | None:
        """What came of the question; None where it was never asked."""
        return self._found.get(_key(label, messages))


class Replay:
    """Asks nobody: every answer is the transcript's. `strict`: a question that is not in it ends the search."""

    def __init__(self, transcript: Transcript, *, strict: bool) -> None:
        self._transcript = transcript
        self._strict = strict

    async def ask(self, messages: Sequence[Message], *, label: str = "", **_: object) -> Answer:
        """The recorded answer; raises EndpointError where none came, or none is recorded."""
        found = self._transcript.find(label, messages)
        if isinstance(found, Answer):
            return found
        if isinstance(found, Unanswered):
            raise EndpointError(found.reason, retryable=False)
        if self._strict:
            raise SettingsError(f"the transcript of llm.replay does not hold the question {label!r}")
        log.warning("replay_misses", question=label)
        raise EndpointError("the transcript does not hold this question", retryable=False)


class Remembering:
    """Asks `chat` only what the transcript has no answer to, so that no answer is paid for twice."""

    def __init__(self, chat: Asks, transcript: Transcript) -> None:
        self._chat = chat
        self._transcript = transcript

    async def ask(self, messages: Sequence[Message], *, label: str = "", **how: Any) -> Answer:
        """The recorded answer, else the one that comes; raises EndpointError."""
        found = self._transcript.find(label, messages)
        if isinstance(found, Answer):
            log.debug("answer_remembered", question=label)
            return found
        return await self._chat.ask(messages, label=label, **how)


def _key(label: str, messages: Sequence[Mapping[str, str]]) -> str:
    asked = [[message["role"], message["content"]] for message in messages]
    return hashlib.sha256(json.dumps([label, asked]).encode()).hexdigest()


def _came(record: Mapping[str, Any]) -> Answer | Unanswered:
    if record["text"] is None:
        return Unanswered(str(record["error"]))
    return Answer(
        text=str(record["text"]),
        endpoint=str(record["endpoint"]),
        prompt_tokens=int(record["prompt_tokens"]),
        completion_tokens=int(record["completion_tokens"]),
        seconds=float(record["seconds"] or 0.0),
        finish_reason=str(record["finish_reason"]),
    )
